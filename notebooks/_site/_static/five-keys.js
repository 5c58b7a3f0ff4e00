/* Five keys that can be moved, in the place of their static picture; rules are in softmax-rules.js,
   and where it begins is stored in the page by the notebook. */
"use strict";
(() => {
  const ITERATIONS = 200, RATE = 0.1;
  // Of a panel, in its own units, with room for an axis.
  const WIDTH = 320, HEIGHT = 170, LEFT = 42, FOOT = 18, HEAD = 22;
  const clamp = (x, [low, high]) => Math.min(high, Math.max(low, x));
  const number = (x) => minus((Math.abs(x) < 0.005 ? 0 : x).toFixed(2));

  /* A drawing with an axis at the left. `rescale` sets what it reaches from and to, `at` is the
     height of a value, `from` the value of a height. */
  function panel(title) {
    const tall = HEIGHT - HEAD - FOOT;
    const grid = element("g", {}), marks = element("g", {});
    let low, high;
    const at = (value) => HEAD + (1 - (value - low) / (high - low)) * tall;
    const from = (y) => low + (1 - (y - HEAD) / tall) * (high - low);
    function rescale(ticks) {
      [low, high] = [ticks[0], ticks.at(-1)];
      grid.replaceChildren(...ticks.flatMap((tick) => [
        element("line", {x1: LEFT, x2: WIDTH, y1: at(tick), y2: at(tick), class: "grid"}),
        element("text", {x: LEFT - 5, y: at(tick) + 4, "text-anchor": "end"}, minus(tick))]));
    }
    const name = element("text", {x: 0, y: 12, class: "title"}, title);
    const box = {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": title};
    return {svg: element("svg", box, name, grid, marks), at, from, marks, rescale};
  }
  /* The smallest of these scales around zero that the values fit into. */
  function fitted(scales, values) {
    const largest = Math.max(...values.map(Math.abs));
    const end = scales.find((end) => end >= largest) ?? scales.at(-1);
    return [-end, 0, end];
  }
  function path(points, name) {
    const steps = points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`);
    return element("path", {d: steps.join(""), fill: "none", class: name});
  }

  /* Put a figure in the place of its picture, above its caption. */
  function replace(name, ...content) {
    const figure = document.getElementById(name);
    figure.querySelector("img").hidden = true;
    // The caption of the static picture says that on the report it could be moved.
    const words = figure.querySelector(".caption-text").lastChild;
    words.data = words.data.replace(/ \(On the report.*\)$/, "");
    figure.querySelector("figcaption").before(element("div", {class: "five-keys"}, ...content));
  }

  // ---- five keys: scores and errors that can be dragged ----

  function row(s, g) {
    const a = softmax(s), f = SOFTMAX_RULES.full.send(a, g), d = SOFTMAX_RULES.diagonal.send(a, g);
    return {a, d, o: f.map((x, i) => x - d[i]), f, b: dot(a, g)};
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
  const INSIDE = [HEAD, HEIGHT - FOOT];

  /* A circle that is a slider: it can be dragged up and down, and moved by keys. */
  function handle(name, {svg, from}, value, set) {
    const made = element("g", {
      role: "slider", tabindex: 0, class: "handle", "aria-label": name,
      "aria-valuemin": SPAN[0], "aria-valuemax": SPAN[1], "aria-orientation": "vertical",
    }, element("rect", {x: -PART / 2, y: -22, width: PART, height: 44, class: "grip"}),
    element("circle", {r: 8}));
    function drag({clientY}) {
      const box = svg.getBoundingClientRect();
      set(from(((clientY - box.top) * HEIGHT) / box.height), true);
    }
    made.addEventListener("pointerdown", (event) => {
      event.preventDefault(); // no text is selected
      made.focus();
      made.setPointerCapture(event.pointerId);
      drag(event);
    });
    made.addEventListener("pointermove", (event) => {
      if (made.hasPointerCapture(event.pointerId)) drag(event);
    });
    const steps = {ArrowUp: 0.1, ArrowRight: 0.1, ArrowDown: -0.1, ArrowLeft: -0.1, PageUp: 1,
      PageDown: -1, Home: -Infinity, End: Infinity};
    made.addEventListener("keydown", (event) => {
      if (!(event.key in steps)) return;
      event.preventDefault(); // the page does not scroll
      set(value() + steps[event.key], false);
    });
    svg.append(made);
    return made;
  }

  function fiveKeys(state) {
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

    // What can be moved: a circle for every score and error, a slider that adds to all, the rule.
    const handles = {}, added = {}, labels = [];
    for (const of of ["scores", "errors"]) {
      const plus = `${of}Plus`, one = of.slice(0, -1);
      handles[of] = state[of].map((_, key) =>
        handle(`${one} of key ${key + 1}`, panels[of], () => state[of][key], (value, drawn) => {
          const own = clamp(drawn ? value - state[plus] : value, SPAN);
          state[of][key] = Math.round(100 * own) / 100;
          update();
        }));
      const output = element("output", {});
      const input = element("input", {type: "range", min: -3, max: 3, step: 0.1, name: plus});
      input.value = state[plus];
      input.addEventListener("input", () => {
        state[plus] = input.valueAsNumber;
        update();
      });
      added[plus] = output;
      labels.push(element("label", {}, `Add to every ${one} `, output, input));
    }
    const options = ["full", "diagonal", "zero"].map((rule) =>
      element("option", {value: rule}, `${SOFTMAX_RULES[rule].name} (${rule})`));
    const choice = element("select", {name: "rule"}, ...options);
    choice.value = state.rule;
    choice.addEventListener("change", () => {
      state.rule = choice.value;
      update();
    });
    labels.push(element("label", {}, "Rule for the iterations ", choice));
    const said = element("p", {role: "status"}), table = element("table", {});

    function bars({at, marks}, groups) {
      marks.replaceChildren();
      const wide = (0.8 * PART) / groups.length, low = HEIGHT - 4;
      groups.forEach(([name, values], i) => {
        if (groups.length > 1) { // a legend, at the right of the title
          const x = WIDTH - 86 + 30 * i, swatch = {x, y: 3, width: 10, height: 10};
          marks.append(element("rect", {...swatch, class: `${name} swatch`}),
            element("text", {x: x + 13, y: 12}, name));
        }
        values.forEach((value, key) => {
          const x = middle(key) + wide * (i - groups.length / 2), y = at(Math.max(0, value));
          const height = at(Math.min(0, value)) - y, label = `key ${key + 1}`;
          marks.append(element("rect", {x, y, width: 0.92 * wide, height, class: name}));
          if (i) return;
          marks.append(element("text", {x: middle(key), y: low, "text-anchor": "middle"}, label));
        });
      });
    }
    function traces({at, marks}, rows) {
      const x = (i) => LEFT + (i / ITERATIONS) * (WIDTH - LEFT - 14), last = rows.at(-1);
      const keys = last.map((_, key) => key).sort((i, j) => last[j] - last[i]);
      let height = -Infinity; // of the label above: none is written over another
      marks.replaceChildren();
      for (const key of keys) {
        const name = `key-${key + 1}`;
        marks.append(path(rows.map((values, i) => [x(i), clamp(at(values[key]), INSIDE)]), name));
        height = Math.max(clamp(at(last[key]), [HEAD, HEIGHT - FOOT - 20]) + 4, height + 10);
        marks.append(element("text", {x: WIDTH - 10, y: height, class: name}, key + 1));
      }
    }
    function update() {
      const s = state.scores.map((x) => x + state.scoresPlus);
      const g = state.errors.map((x) => x + state.errorsPlus);
      const {a, d, o, f, b} = row(s, g), scores = descend(s, g, state.rule);
      const last = scores.at(-1), after = softmax(last);
      panels.sent.rescale(fitted([0.5, 1, 2], [...d, ...o, ...f]));
      panels.scoresAfter.rescale(fitted([3, 6, 12, 24, 60, 120], scores.flat()));
      bars(panels.scores, [["score", s]]);
      bars(panels.weights, [["weight", a]]);
      bars(panels.errors, [["error", g]]);
      bars(panels.sent, [["d", d], ["o", o], ["f", f]]);
      const y = panels.errors.at(b);
      panels.errors.marks.append(element("line", {x1: LEFT, x2: WIDTH, y1: y, y2: y, class: "b"}));
      traces(panels.scoresAfter, scores);
      traces(panels.weightsAfter, scores.map(softmax));
      for (const [of, values] of [["scores", s], ["errors", g]]) {
        handles[of].forEach((made, key) => {
          const place = `translate(${middle(key)} ${panels[of].at(values[key])})`;
          made.setAttribute("transform", place);
          made.setAttribute("aria-valuenow", state[of][key]);
        });
      }
      for (const [plus, output] of Object.entries(added)) output.textContent = number(state[plus]);
      const moved = (sum(last) - sum(s)) / 5;
      const most = Math.max(...after.map((w, i) => Math.abs(w - a[i])));
      said.textContent = `b = ${number(b)}. Row sums: d ${number(sum(d))}, o ${number(sum(o))},
        f ${number(sum(f))}. After ${ITERATIONS} iterations the mean score has moved by
        ${number(moved)}, and no weight by more than ${number(most)}.`;
      const columns = Object.entries({s, a, g, d, o, f, "s after": last, "a after": after});
      const line = (cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, cell)));
      table.replaceChildren(line(["key", ...columns.map(([name]) => name)]), ...s.map((_, key) =>
        line([key + 1, ...columns.map(([, values]) => number(values[key]))])));
    }

    replace("figure-9-4", element("div", {class: "controls"}, ...labels),
      element("div", {class: "panels"}, ...Object.values(panels).map(({svg}) => svg)), said,
      element("details", {}, element("summary", {}, "In numbers"),
        element("div", {class: "table"}, table)));
    update();
  }

  fiveKeys(JSON.parse(document.getElementById("five-keys-start").textContent));
})();
