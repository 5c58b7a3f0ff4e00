/* The two figures of the front page that can be moved: five keys (SOFTMAX_RULES is in softmax-rules.js), and losses by
   the iteration. Each takes the place of its static picture; what they draw is stored in the page by the notebook. */
"use strict";
const ESSAY = (() => {
  const ITERATIONS = 200, RATE = 0.1;
  const [WIDTH, NARROW, HEIGHT, LEFT, FOOT, HEAD] = [320, 240, 170, 42, 18, 22]; // of a panel, in its own units

  function element(tag, attributes, ...content) {
    const svg = ["svg", "g", "rect", "line", "path", "text", "circle"].includes(tag);
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...content);
    return made;
  }
  const sum = (row) => row.reduce((total, x) => total + x, 0);
  const clamp = (x, [low, high]) => Math.min(high, Math.max(low, x));
  const number = (x) => (Math.abs(x) < 0.005 ? 0 : x).toFixed(2).replace("-", "−");

  /* A drawing with an axis at the left; `rescale` sets what it reaches from and to, `at` is the height of a value. */
  function panel(title, {width = WIDTH, log = false} = {}) {
    const scale = log ? Math.log10 : (x) => x, grid = element("g", {}), marks = element("g", {});
    let low, high;
    const at = (value) => HEAD + (1 - (scale(value) - low) / (high - low)) * (HEIGHT - HEAD - FOOT);
    const from = (y) => low + (1 - (y - HEAD) / (HEIGHT - HEAD - FOOT)) * (high - low);
    function rescale(ticks, ends = [ticks[0], ticks.at(-1)]) {
      [low, high] = ends.map(scale);
      grid.replaceChildren(...ticks.flatMap((tick) => [
        element("line", {x1: LEFT, x2: width, y1: at(tick), y2: at(tick), class: "grid"}),
        element("text", {x: LEFT - 5, y: at(tick) + 4, "text-anchor": "end"}, String(tick).replace("-", "−"))]));
    }
    const svg = element("svg", {viewBox: `0 0 ${width} ${HEIGHT}`, role: "group", "aria-label": title},
      element("text", {x: 0, y: 12, class: "title"}, title), grid, marks);
    return {svg, at, from, marks, rescale};
  }
  /* The smallest of these scales around zero that the values fit into. */
  function fitted(scales, values) {
    const largest = Math.max(...values.map(Math.abs)), end = scales.find((end) => end >= largest) ?? scales.at(-1);
    return [-end, 0, end];
  }
  const path = (points, attributes) =>
    element("path", {d: points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join(""), fill: "none", ...attributes});

  /* Put a figure in the place of its picture, above its caption. */
  function replace(name, ...content) {
    const figure = document.getElementById(name);
    figure.querySelector("img").hidden = true;
    const words = figure.querySelector(".caption-text").lastChild; // of the static picture it says that it could be moved
    words.data = words.data.replace(/ \(On the report.*\)$/, "");
    figure.querySelector("figcaption").before(element("div", {class: "essay"}, ...content));
  }

  // ---- five keys: scores and errors that can be dragged ----

  function softmax(s) {
    const highest = Math.max(...s), raised = s.map((x) => Math.exp(x - highest)), total = sum(raised);
    return raised.map((e) => e / total);
  }
  function row(s, g) {
    const a = softmax(s), f = SOFTMAX_RULES.full.send(a, g), d = SOFTMAX_RULES.diagonal.send(a, g);
    return {a, d, o: f.map((x, i) => x - d[i]), f, b: sum(a.map((w, i) => w * g[i]))};
  }
  /* Scores after every iteration of gradient descent, the errors staying as they are. */
  function descend(s, g, rule) {
    const scores = [s];
    for (let i = 0; i < ITERATIONS; i++) {
      const sent = SOFTMAX_RULES[rule].send(softmax(s), g);
      s = s.map((x, j) => x - RATE * sent[j]);
      scores.push(s);
    }
    return scores;
  }

  const SPAN = [-3, 3], PART = (WIDTH - LEFT) / 5, middle = (key) => LEFT + PART * (key + 0.5);

  function fiveKeys(start) {
    const state = structuredClone(start);
    const panels = {
      scores: panel("scores s: drag them"),
      weights: panel("attention weights a, the softmax of s"),
      errors: panel("errors g: drag them; dashed: b"),
      sent: panel("at the scores: d, o, and f = d + o"),
      scoresAfter: panel(`scores over ${ITERATIONS} iterations`),
      weightsAfter: panel(`attention over ${ITERATIONS} iterations`),
    };
    for (const of of ["scores", "errors"]) panels[of].rescale([-6, -3, 0, 3, 6]);
    for (const of of ["weights", "weightsAfter"]) panels[of].rescale([0, 0.5, 1]);
    const handles = {};
    for (const of of ["scores", "errors"]) {
      const {svg, from} = panels[of], plus = `${of}Plus`;
      handles[of] = start[of].map((_, key) => {
        const handle = element("g", {role: "slider", tabindex: 0, "aria-label": `${of.slice(0, -1)} of key ${key + 1}`,
          "aria-valuemin": SPAN[0], "aria-valuemax": SPAN[1], "aria-orientation": "vertical", class: "handle"},
          element("rect", {x: -PART / 2, y: -22, width: PART, height: 44, class: "grip"}), element("circle", {r: 8}));
        const set = (value) => { state[of][key] = Math.round(100 * clamp(value, SPAN)) / 100; update(); };
        const drag = ({clientY}) => {
          const box = svg.getBoundingClientRect();
          set(from(((clientY - box.top) * HEIGHT) / box.height) - state[plus]);
        };
        handle.addEventListener("pointerdown", (event) => {
          event.preventDefault(); // no text is selected
          handle.focus();
          handle.setPointerCapture(event.pointerId);
          drag(event);
        });
        handle.addEventListener("pointermove", (event) => handle.hasPointerCapture(event.pointerId) && drag(event));
        handle.addEventListener("keydown", (event) => {
          const by = {ArrowUp: 0.1, ArrowRight: 0.1, ArrowDown: -0.1, ArrowLeft: -0.1, PageUp: 1, PageDown: -1}[event.key];
          const to = {Home: SPAN[0], End: SPAN[1]}[event.key] ?? (by && state[of][key] + by);
          if (to === undefined) return;
          event.preventDefault(); // the page does not scroll
          set(to);
        });
        svg.append(handle);
        return handle;
      });
    }
    const slider = (name, words) => {
      const value = element("output", {}), input = element("input", {type: "range", min: SPAN[0], max: SPAN[1], step: 0.1, value: 0, name});
      input.addEventListener("input", () => { state[name] = input.valueAsNumber; update(); });
      return [element("label", {}, `${words} `, value, input), input, value];
    };
    const [plusScores, scoresInput, scoresValue] = slider("scoresPlus", "Add to every score");
    const [plusErrors, errorsInput, errorsValue] = slider("errorsPlus", "Add to every error");
    const rules = Object.entries(SOFTMAX_RULES).map(([rule, {name}]) => element("option", {value: rule}, `${name} (${rule})`));
    const choice = element("select", {name: "rule"}, ...rules), reset = element("button", {type: "button"}, "As it was");
    choice.addEventListener("change", () => { state.rule = choice.value; update(); });
    reset.addEventListener("click", () => {
      Object.assign(state, structuredClone(start));
      update();
    });
    const said = element("p", {role: "status"}), table = element("table", {});

    function bars({at, marks}, groups) {
      marks.replaceChildren();
      const wide = (0.8 * PART) / groups.length;
      if (groups.length > 1) {
        marks.append(...groups.flatMap(([name], i) => [element("rect", {x: WIDTH - 86 + 30 * i, y: 3, width: 10, height: 10, class: `${name} swatch`}),
          element("text", {x: WIDTH - 73 + 30 * i, y: 12}, name)]));
      }
      groups.forEach(([name, values], i) => values.forEach((value, key) => {
        const x = middle(key) + wide * (i - groups.length / 2), [top, foot] = [at(Math.max(0, value)), at(Math.min(0, value))];
        marks.append(element("rect", {x, y: top, width: 0.92 * wide, height: foot - top, class: name}));
        if (!i) marks.append(element("text", {x: middle(key), y: HEIGHT - 4, "text-anchor": "middle"}, `key ${key + 1}`));
      }));
    }
    function traces({at, marks}, rows) {
      const x = (i) => LEFT + (i / ITERATIONS) * (WIDTH - LEFT - 14), heights = [];
      marks.replaceChildren();
      rows[0].map((_, key) => key).sort((i, j) => rows.at(-1)[j] - rows.at(-1)[i]).forEach((key) => {
        marks.append(path(rows.map((values, i) => [x(i), clamp(at(values[key]), [HEAD, HEIGHT - FOOT])]), {class: `key-${key + 1}`}));
        heights.push(Math.max(clamp(at(rows.at(-1)[key]), [HEAD, HEIGHT - FOOT - 20]) + 4, (heights.at(-1) ?? 0) + 10)); // not one over the other
        marks.append(element("text", {x: WIDTH - 10, y: heights.at(-1), class: `key-${key + 1}`}, key + 1));
      });
    }
    function update() {
      const s = state.scores.map((x) => x + state.scoresPlus), g = state.errors.map((x) => x + state.errorsPlus);
      const {a, d, o, f, b} = row(s, g), scores = descend(s, g, state.rule), after = softmax(scores.at(-1));
      panels.sent.rescale(fitted([0.5, 1, 2], [...d, ...o, ...f]));
      panels.scoresAfter.rescale(fitted([3, 6, 12, 24, 60, 120], scores.flat()));
      bars(panels.scores, [["score", s]]);
      bars(panels.weights, [["weight", a]]);
      bars(panels.errors, [["error", g]]);
      bars(panels.sent, [["d", d], ["o", o], ["f", f]]);
      panels.errors.marks.append(element("line", {x1: LEFT, x2: WIDTH, y1: panels.errors.at(b), y2: panels.errors.at(b), class: "b"}));
      traces(panels.scoresAfter, scores);
      traces(panels.weightsAfter, scores.map(softmax));
      for (const [of, values] of [["scores", s], ["errors", g]]) handles[of].forEach((handle, key) => {
        handle.setAttribute("transform", `translate(${middle(key)} ${panels[of].at(values[key])})`);
        handle.setAttribute("aria-valuenow", state[of][key]);
      });
      [[scoresInput, scoresValue, state.scoresPlus], [errorsInput, errorsValue, state.errorsPlus]].forEach(([input, output, value]) => {
        input.value = value;
        output.textContent = number(value);
      });
      choice.value = state.rule;
      const moved = (sum(scores.at(-1)) - sum(s)) / 5, most = Math.max(...after.map((w, i) => Math.abs(w - a[i])));
      said.textContent = `b = ${number(b)}. Row sums: d ${number(sum(d))}, o ${number(sum(o))}, f ${number(sum(f))}. `
        + `After ${ITERATIONS} iterations the mean score has moved by ${number(moved)}, and no weight by more than ${number(most)}.`;
      const columns = {s, a, g, d, o, f, "s after": scores.at(-1), "a after": after};
      const line = (kind, cells) => element("tr", {}, ...cells.map((cell) => element(kind, {}, cell)));
      table.replaceChildren(line("th", ["key", ...Object.keys(columns)]),
        ...s.map((_, key) => line("td", [key + 1, ...Object.values(columns).map((values) => number(values[key]))])));
    }

    replace("figure-0-2", element("div", {class: "controls"}, plusScores, plusErrors, element("label", {}, "Rule for the iterations ", choice), reset),
      element("div", {class: "panels"}, ...Object.values(panels).map(({svg}) => svg)), said,
      element("details", {}, element("summary", {}, "In numbers"), element("div", {class: "table"}, table)));
    update();
  }

  // ---- losses against the learning rate, by the iteration ----

  function rates({iterations, ends, rates, panels}) {
    const value = element("output", {}), last = iterations.length - 1;
    const input = element("input", {type: "range", min: 0, max: last, value: last, name: "iteration"});
    const decades = (rate) => Math.log10(rate / rates[0]) / Math.log10(rates.at(-1) / rates[0]);
    const across = (rate) => LEFT + 14 + decades(rate) * (NARROW - LEFT - 36);
    const drawn = panels.map(({title, curves}) => {
      const made = panel(title, {width: NARROW, log: true});
      made.rescale([0.001, 0.01, 0.1, 1], ends);
      made.svg.append(...rates.map((rate) => element("text", {x: across(rate), y: HEIGHT - 4, "text-anchor": "middle"},
        rate.toExponential(0).replace("-", "−"))));
      return {...made, curves};
    });
    function update() {
      const now = input.valueAsNumber;
      value.textContent = input.ariaValueText = `after ${iterations[now].toLocaleString("en")} iterations`;
      for (const {at, marks, curves} of drawn) {
        marks.replaceChildren();
        for (const [rule, {lr, losses}] of Object.entries(curves)) {
          const points = lr.map((rate, i) => [across(rate), at(clamp(losses[i][now], ends))]);
          marks.append(path(points, {class: rule}), ...points.map(([cx, cy]) => element("circle", {cx, cy, r: 3, class: rule})));
        }
      }
    }
    input.addEventListener("input", update);
    const legend = Object.keys(panels[0].curves).map((rule) => element("span", {class: rule}, `${SOFTMAX_RULES[rule].name} (${rule})`));
    replace("figure-0-6", element("div", {class: "controls"}, element("label", {}, "Losses ", value, input)), element("p", {class: "legend"}, ...legend),
      element("div", {class: "panels three"}, ...drawn.map(({svg}) => svg)), element("p", {class: "axis"}, "validation loss (nats) against the learning rate"));
    update();
  }

  for (const [make, name] of [[fiveKeys, "five-keys"], [rates, "rates"]]) make(JSON.parse(document.getElementById(name).textContent));
  return {row, descend};
})();
