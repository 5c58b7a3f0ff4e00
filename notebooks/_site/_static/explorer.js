/* The explorer: from A and g of a head it computes f, d and o, and keeps controls, pictures and
   address together. EXPLORER, the data, is written by 07_explore.ipynb; the model for a text of
   one's own is in explorer-model.js. */
"use strict";
(() => {
  const {layers, heads, maps, opening, settled} = EXPLORER;
  const shapes = new Map(EXPLORER.vocabulary); // how each character is shown
  const METHODS = {bp: "backpropagation", fa: "feedback alignment"};
  const STEPS = Object.keys(maps.bp).map(Number), LAST = STEPS.at(-1);
  const HEADS = Array.from({length: layers * heads}, (_, head) => head);
  const NAMES = ["a", "g", "ag", "d", "o", "f"]; // of the maps
  const UNCHANGED = {temperature: 1, constant: 0, weight: ""}; // "": the key keeps its own
  const START = {...opening, query: 17, key: 4, ...UNCHANGED, text: "", rule: "full"};
  const PRESETS = [START, {...START, constant: 3}, {...START, ...settled}]; // told in the page
  const state = {...START};

  const $ = (name) => document.querySelector(`#explorer-${name}`);
  const minus = (words) => words.replaceAll("-", "−");
  function number(x) {
    return minus((Math.abs(x) < 1e-9 ? 0 : x).toLocaleString("en", {maximumSignificantDigits: 3}));
  }
  const headName = (head) => `L${Math.floor(head / heads)}H${head % heads}`;
  const dot = (x, y) => x.reduce((total, v, i) => total + v * y[i], 0);

  // ---- the numbers ----

  function unpack(base64, Type) {
    return new Type(Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)).buffer);
  }

  /* A head's lower triangles, row by row: weights that sum to one, and errors in millionths. */
  function stored({method, step}, head) {
    const kept = maps[method][step], T = EXPLORER.characters.length, n = (T * (T + 1)) / 2;
    kept.as ??= unpack(kept.a, Uint16Array);
    kept.gs ??= unpack(kept.g, Int16Array);
    const unit = (1e6 * kept.scale[head]) / 32767, a = [], g = [];
    for (let query = 0, at = head * n; query < T; at += ++query) {
      a.push(Array.from(kept.as.subarray(at, at + query + 1), (q) => (q / 65535) ** 4));
      g.push(Array.from(kept.gs.subarray(at, at + query + 1), (q) => q * unit));
    }
    return {a, g};
  }

  // The text whose maps are there: until a model has loaded, the one before.
  let shown = {text: "", key: "", said: ""};

  function characters() {
    const own = [...shown.text].slice(0, -1); // the last one is only predicted
    return shown.text ? own.map((c) => shapes.get(c)) : EXPLORER.characters;
  }

  /* All that follows from a and g of a head, with temperature, constant and a weight by hand: an
     entry for every key of every query. */
  function view(head, {temperature, constant, weight}) {
    const {a, g} = shown.text ? shown.heads[head] : stored(state, head);
    const all = g.flat(), mean = sum(all) / all.length;
    const added = constant * Math.sqrt(sum(all.map((v) => (v - mean) ** 2)) / all.length);
    return a.map((weights, query) => {
      const highest = Math.max(...weights);
      let row = weights.map((w) => (w / highest) ** (1 / temperature));
      const total = sum(row);
      row = row.map((w) => w / total);
      if (weight !== "" && query === state.query && query > 0) {
        const others = 1 - row[state.key]; // they keep their proportions
        row = row.map((w, key) => (key === state.key ? +weight : (w * (1 - weight)) / others));
      }
      const errors = g[query].map((v) => v + added), b = dot(row, errors);
      return row.map((a, i) => {
        const g = errors[i];
        return {a, g, ag: a * g, d: a * (1 - a) * g, o: -a * (b - a * g), f: a * (g - b)};
      });
    });
  }

  // ---- the controls ----

  function radios(fieldset, name, options, content) {
    for (const value of options) {
      const input = element("input", {type: "radio", name, value});
      input.addEventListener("change", () => update({[name]: value}));
      fieldset.append(element("label", {}, input, element("span", {}, ...content(value))));
    }
  }
  radios($("method"), "method", Object.keys(METHODS), (method) => [METHODS[method]]);
  radios($("step"), "step", STEPS, (step) => [step]);
  radios($("head"), "head", HEADS, (head) => [headName(head), " ", element("small", {})]);
  $("head").style.setProperty("--heads", heads);
  $("rule").append(...Object.entries(SOFTMAX_RULES).map(([rule, {name}]) =>
    element("option", {value: rule}, `${name} (${rule})`)));

  function on(name, event, change) {
    $(name).addEventListener(event, ({target}) => update(change(target)));
  }
  on("rule", "change", ({value}) => ({rule: value}));
  for (const name of ["query", "key", "constant"]) {
    on(name, "input", ({valueAsNumber}) => ({[name]: valueAsNumber}));
  }
  on("temperature", "input", ({value}) => ({temperature: +(10 ** value).toFixed(3)}));
  on("weight", "input", ({value}) => ({weight: value}));
  on("by-hand", "change", ({checked}) => ({weight: checked ? $("weight").value : ""}));
  on("reset", "click", () => UNCHANGED);
  let typed;
  $("text").addEventListener("input", ({target}) => {
    clearTimeout(typed);
    typed = setTimeout(() => update({text: target.value}), 300);
  });
  document.forms.explorer.addEventListener("submit", (event) => event.preventDefault());
  [...$("presets").children].forEach((button, i) =>
    button.addEventListener("click", () => update(PRESETS[i])));

  // ---- a text of one's own ----

  const scripts = {}, models = {};
  function load(name) {
    return (scripts[name] ??= new Promise((resolve) => {
      // a page on disk may fetch nothing, but scripts it may have
      const made = element("script", {src: `_static/explorer-${name}.js`});
      made.onload = resolve;
      document.head.append(made);
    }));
  }
  const say = (words) => ($("said").textContent = words);

  /* Makes state.text the one that is shown, as far as it can be. */
  async function readText() {
    const {text, rule, method} = state;
    const key = text && JSON.stringify([text, rule, method]);
    if (key === shown.key) return say(shown.said); // back from a text that was refused
    const absent = [...text].find((c) => !shapes.has(c));
    if (absent) return say(`The models know no “${absent}”.`);
    if (text && text.length < 3) return say("It takes 3 to 65 characters.");
    if (!text) shown = {text, key, said: ""};
    else {
      say("Loading the model …");
      await load("model");
      await load(method);
      models[method] ??= LocalGPT.load(EXPLORER_WEIGHTS[method], EXPLORER);
      const {a, g, loss} = LocalGPT.run(models[method], text, rule);
      const numbers = HEADS.map((head) => ({
        a: a[head].map((row) => [...row]),
        g: g[head].map((row) => Array.from(row, (v) => 1e6 * v)),
      }));
      const said = `L = ${number(loss)} nats a character at iteration ${LAST}.`;
      shown = {text, key, said, heads: numbers};
    }
    say(shown.said);
  }

  // ---- the pictures, in the colours of a light page: the style sheet turns them for a dark one

  const MAGMA = [[255, 255, 255], [252, 137, 97], [183, 55, 121], [81, 18, 124], [0, 0, 4]];
  const DIVERGING = [[5, 48, 97], [67, 147, 195], [255, 255, 255], [214, 96, 77], [103, 0, 31]];

  /* x from 0 to 1 along some colours. */
  function blend(colors, x) {
    const at = x * (colors.length - 1), i = Math.min(Math.floor(at), colors.length - 2);
    const mixed = colors[i].map((v, c) => Math.round(v + (at - i) * (colors[i + 1][c] - v)));
    return `rgb(${mixed})`;
  }
  const shade = (v) => Math.sign(v) * Math.sqrt(Math.min(1, Math.abs(v)));

  /* Where things are in a map: labels at the left and below. */
  function places(width) {
    const T = characters().length, left = 13, side = width - left - 2;
    return {T, left, side, cell: side / T};
  }

  for (const name of NAMES) {
    const place = $(`map-${name}`);
    place.addEventListener("click", ({clientX, clientY}) => {
      const box = place.getBoundingClientRect(), {T, left, cell} = places(box.width);
      const query = Math.floor((clientY - box.top) / cell);
      const key = Math.floor((clientX - box.left - left) / cell);
      if (0 <= key && key <= query && query < T) update({query, key});
    });
  }

  /* What full colour stands for: the largest of the head as it came; d, o and f share one. */
  function limitsOf(made) {
    const largest = (...names) => made.flat().reduce((high, entry) =>
      Math.max(high, ...names.map((name) => Math.abs(entry[name]))), 0) || 1;
    const parts = largest("d", "o", "f");
    return {a: 1, g: largest("g"), ag: largest("ag"), d: parts, o: parts, f: parts};
  }

  function drawMap(name, made, limit) {
    const canvas = $(`map-${name} canvas`), width = canvas.clientWidth, scale = devicePixelRatio;
    const {left, side, cell} = places(width), colors = name === "a" ? MAGMA : DIVERGING;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round((side + 16) * scale);
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.textAlign = "center";
    context.textBaseline = "middle";
    made.forEach((row, query) => row.forEach((entry, key) => {
      const v = shade(entry[name] / limit);
      context.fillStyle = blend(colors, name === "a" ? v : (v + 1) / 2);
      context.fillRect(left + key * cell, query * cell, cell + 0.5, cell + 0.5);
    }));
    context.fillStyle = "black";
    context.font = `${Math.max(7, Math.min(12, cell * 1.35))}px monospace`;
    characters().forEach((c, i) => {
      context.fillText(c, left / 2, (i + 0.5) * cell);
      context.fillText(c, left + (i + 0.5) * cell, side + 8);
    });
    // A frame around the row of the query, and one around the key.
    for (const [x, n] of [[0, state.query + 1], [state.key, 1]]) {
      for (const [color, line] of [["white", 3], ["black", 1]]) {
        context.strokeStyle = color;
        context.lineWidth = line;
        context.strokeRect(left + x * cell - 1.5, state.query * cell - 1.5, n * cell + 3, cell + 3);
      }
    }
    $(`scale-${name}`).textContent = number(limit);
  }

  // ---- keeping them together ----

  let latest = 0;
  async function update(change) {
    const turn = ++latest;
    Object.assign(state, change);
    await readText();
    if (turn !== latest) return; // another change is under way
    if (shown.text) state.step = LAST; // the moment whose weights are there
    state.query = Math.min(state.query, characters().length - 1);
    state.key = Math.min(state.key, state.query);
    draw();
  }

  function draw() {
    const made = view(state.head, state), limits = limitsOf(view(state.head, UNCHANGED));
    for (const name of NAMES) drawMap(name, made, limits[name]);
    for (const head of HEADS) {
      const entries = view(head, state).flat();
      const d = entries.map((entry) => entry.d), f = entries.map((entry) => entry.f);
      const cosine = dot(d, f) / Math.sqrt(dot(d, d) * dot(f, f));
      $(`head [value="${head}"] + span small`).textContent = minus(cosine.toFixed(2));
    }
    drawControls();
    drawWords(made);
  }

  const label = (i) => `${i} ${characters()[i]}`;

  function drawControls() {
    for (const name of ["method", "step", "head"]) {
      for (const input of document.getElementsByName(name)) {
        input.checked = input.value === String(state[name]);
        input.disabled = name === "step" && shown.text !== "" && input.value !== String(LAST);
      }
    }
    $("query").max = characters().length - 1;
    $("key").max = state.query;
    for (const name of ["query", "key", "constant", "rule"]) $(`${name}`).value = state[name];
    $("temperature").value = Math.log10(state.temperature);
    if (state.weight !== "") $("weight").value = state.weight;
    $("by-hand").checked = state.weight !== "";
    $("weight").disabled = state.weight === "";
    $("rule").disabled = shown.text === "";
    if (document.activeElement !== $("text")) $("text").value = state.text;
    const words = {
      query: label(state.query),
      key: label(state.key),
      temperature: number(state.temperature),
      constant: number(state.constant),
      weight: state.weight === "" ? "as it is" : `= ${number(+state.weight)}`,
    };
    for (const [name, value] of Object.entries(words)) {
      $(`${name}-value`).textContent = value;
      $(`${name}`).setAttribute("aria-valuetext", value);
    }
  }

  function drawWords(made) {
    const {query, key} = state, row = made[query];
    const whole = (name) => number(sum(row.map((entry) => entry[name])));
    const at = (name) => number(row[key][name]);
    const about = [
      `${headName(state.head)}, ${METHODS[state.method]}, iteration ${state.step}.
        Query ${label(query)}: lateral sum b = ${whole("ag")}; over its keys d sums to ${whole("d")}
        and o to ${whole("o")}.`,
      `Key ${label(key)}: A = ${at("a")}, g = ${at("g")}; d = ${at("d")} and o = ${at("o")} make
        f = ${at("f")}.`,
    ];
    $("readout").replaceChildren(...about.map((sentence) => element("p", {}, sentence)));
    const line = (head, kind, cells) => element("tr", {}, element("th", {}, head),
      ...cells.map((cell) => element(kind, {}, cell)));
    $("table").replaceChildren(line("key", "th", NAMES), ...row.map((entry, i) =>
      line(label(i), "td", NAMES.map((name) => number(entry[name])))));
  }

  addEventListener("resize", draw);
  $("corpus").textContent = `of ${EXPLORER.corpus}`;
  update(START);
})();
