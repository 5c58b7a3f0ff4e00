/* What the softmax sends back under every rule: dL/ds of a row from its weights a and errors g, as model_local.py has it;
   and the rule's name in plain words. For the front page and the explorer. */
"use strict";
const SOFTMAX_RULES = (() => {
  const sum = (row) => row.reduce((total, x) => total + x, 0);
  const lateral = (a, g) => sum(a.map((w, i) => w * g[i])), mean = (a, g) => sum(g) / g.length, zero = () => 0;
  function baseline(slope, of) {
    return (a, g) => {
      const c = of(a, g);
      return a.map((w, i) => w * (slope ? 1 - w : 1) * (g[i] - c));
    };
  }
  const diagonal = baseline(true, zero);
  return {
    full: {name: "minus the lateral sum: exact", send: baseline(false, lateral)},
    diagonal: {name: "own error only", send: diagonal},
    zero: {name: "no baseline", send: baseline(false, zero)},
    mean: {name: "minus the plain mean", send: baseline(false, mean)},
    diagonal_mean: {name: "own slope, minus the mean", send: baseline(true, mean)},
    diagonal_lateral: {name: "own slope, minus the sum", send: baseline(true, lateral)},
    balanced_evenly: {
      name: "balanced evenly", send: (a, g) => diagonal(a, g).map((d, i, all) => d - sum(all) / all.length),
    },
    balanced_by_attention: {
      name: "balanced by attention", send: (a, g) => diagonal(a, g).map((d, i, all) => d - a[i] * sum(all)),
    },
    ste: {name: "passed straight through", send: (a, g) => g},
    none: {name: "nothing sent back", send: (a) => a.map(zero)},
  };
})();
