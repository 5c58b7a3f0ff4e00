/* For the front page and the explorer: what both need, and what the softmax sends back under every
   rule, dL/ds of a row from its weights a and errors g, as model_local.py has it; and its name. */
"use strict";
const sum = (row) => row.reduce((total, x) => total + x, 0);
const minus = (words) => String(words).replaceAll("-", "−");

function dot(x, y) {
  let total = 0;
  for (let i = 0; i < x.length; i++) total += x[i] * y[i];
  return total;
}
function softmax(s) {
  const highest = Math.max(...s), raised = s.map((x) => Math.exp(x - highest)), whole = sum(raised);
  return raised.map((e) => e / whole);
}
function unpack(base64, Type) {
  return new Type(Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)).buffer);
}

/* Never as HTML: the words may be those of any text. */
function element(tag, attributes, ...content) {
  const isShape = ["svg", "g", "rect", "line", "path", "text", "circle"].includes(tag);
  const space = isShape ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const made = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...content);
  return made;
}

const SOFTMAX_RULES = (() => {
  const mean = (a, g) => sum(g) / g.length;
  const zero = () => 0;
  function baseline(slope, of) {
    return (a, g) => {
      const c = of(a, g);
      return a.map((w, i) => w * (slope ? 1 - w : 1) * (g[i] - c));
    };
  }
  const diagonal = baseline(true, zero);
  function balanced(share) {
    return (a, g) => diagonal(a, g).map((d, i, all) => d - share(a, i) * sum(all));
  }
  return {
    full: {name: "exact pass", send: baseline(false, dot)},
    diagonal: {name: "own error only", send: diagonal},
    zero: {name: "no baseline", send: baseline(false, zero)},
    mean: {name: "minus the plain mean", send: baseline(false, mean)},
    diagonal_mean: {name: "own slope, minus the mean", send: baseline(true, mean)},
    diagonal_lateral: {name: "own slope, minus the sum", send: baseline(true, dot)},
    balanced_evenly: {name: "balanced evenly", send: balanced((a) => 1 / a.length)},
    balanced_by_attention: {name: "balanced by attention", send: balanced((a, i) => a[i])},
    ste: {name: "passed straight through", send: (a, g) => g},
    none: {name: "never trained", send: (a) => a.map(zero)},
  };
})();
