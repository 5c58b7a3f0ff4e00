/* The explorer: what follows from A and g of a head, its controls and its pictures. EXPLORER, the
   data, is written by 04_energy_split.ipynb#section-4-6; the model for one's own text is in explorer-model.js. */
"use strict";
(() => {
  const {layers, heads, maps, opening, settled} = EXPLORER;
  const shapes = new Map(EXPLORER.vocabulary); // how each character is shown
  const read = new Map(EXPLORER.vocabulary.map(([character, shape]) => [shape, character]));
  const passage = EXPLORER.characters.map((shape) => read.get(shape)).join("");
  const METHODS = {bp: "backpropagation", fa: "feedback alignment"};
  const STEPS = Object.keys(maps.bp).map(Number), LAST = STEPS.at(-1);
  const HEADS = Array.from({length: layers * heads}, (_, head) => head);
  const NAMES = ["a", "g", "ag", "d", "o", "f", "sent"]; // of the maps
  // The temperature is a power of ten; a weight of "" is the key's own.
  const UNCHANGED = {temperature: 0, constant: 0, weight: ""};
  const START = {...opening, query: 17, key: 4, ...UNCHANGED, text: "", rule: "full"};
  const PRESETS = [START, {...START, constant: 3, rule: "zero"}, {...START, ...settled}];
  const state = {...START};

  const $ = (name) => document.querySelector(`#explorer-${name}`);
  const number = (x) =>
    minus((Math.abs(x) < 1e-9 ? 0 : x).toLocaleString("en", {maximumSignificantDigits: 3}));
  const headName = (head) => `L${Math.floor(head / heads)}H${head % heads}`;

  // ---- the numbers ----

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
  const PASSAGE = {text: "", key: "", said: "", characters: EXPLORER.characters};
  let shown = PASSAGE;

  /* All that follows from a and g of a head, with temperature, constant and a weight by hand: an
     entry for every key of every query. */
  function view(head, {temperature, constant, weight}) {
    const {a, g} = shown.text ? shown.heads[head] : stored(state, head);
    const all = g.flat(), mean = sum(all) / all.length;
    const added = constant * Math.sqrt(sum(all.map((v) => (v - mean) ** 2)) / all.length);
    return a.map((weights, query) => {
      const highest = Math.max(...weights);
      let row = weights.map((w) => (w / highest) ** (1 / 10 ** temperature));
      const total = sum(row);
      row = row.map((w) => w / total);
      if (weight !== "" && query === state.query && query > 0) {
        const others = 1 - row[state.key]; // they keep their proportions
        row = row.map((w, key) => (key === state.key ? weight : (w * (1 - weight)) / others));
      }
      const errors = g[query].map((v) => v + added), b = dot(row, errors);
      const sent = SOFTMAX_RULES[state.rule].send(row, errors);
      return row.map((a, i) => {
        const g = errors[i], d = a * (1 - a) * g, o = -a * (b - a * g);
        return {a, g, ag: a * g, d, o, f: a * (g - b), sent: sent[i]};
      });
    });
  }

  // ---- the controls ----

  function radios(name, options, content) {
    for (const value of options) {
      const input = element("input", {type: "radio", name, value});
      $(name).append(element("label", {}, input, element("span", {}, ...content(value))));
    }
  }
  radios("method", Object.keys(METHODS), (method) => [METHODS[method]]);
  radios("step", STEPS, (step) => [step]);
  radios("head", HEADS, (head) => [headName(head), " ", element("small", {})]);
  $("head").style.setProperty("--heads", heads);
  $("rule").append(...Object.entries(SOFTMAX_RULES).map(([rule, {name}]) =>
    element("option", {value: rule}, `${name} (${rule})`)));

  // Controls have the names of what they set.
  document.forms.explorer.addEventListener("input", ({target: {name, value}}) => {
    if (name in state) update({[name]: isNaN(value) ? value : +value});
  });
  $("reset").addEventListener("click", () => update(UNCHANGED));
  let typed;
  $("text").addEventListener("input", ({target}) => {
    clearTimeout(typed);
    const {query, key} = START; // those of a short text would stay behind
    typed = setTimeout(() => update({text: target.value, query, key}), 300);
  });
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

  // What word processors write, and what is written where the models do not know it.
  const PLAIN = {"’": "'", "‘": "'", "“": '"', "”": '"', '"': "'", "–": "-", "—": "-"};
  const plain = (c) => (shapes.has(c) || !(c in PLAIN) ? c : plain(PLAIN[c]));

  /* Makes state.text the one that is shown, as far as it can be. */
  async function readText() {
    const {rule, method} = state, typed = [...state.text].map(plain);
    const longest = EXPLORER.positions + 1, text = typed.slice(0, longest).join("");
    const key = text && JSON.stringify([state.text, rule, method]);
    const absent = [...text].find((c) => !shapes.has(c));
    let refused = text && typed.length < 3 ? `It takes 3 to ${longest} characters.` : "";
    if (absent) refused = `The models know no “${absent}”.`;
    $("maps").classList.toggle("stale", refused !== "");
    if (refused) return say(`${refused} The pale maps are still those of the text before.`);
    if (key === shown.key) return say(shown.said); // back from a text that was refused
    if (!text) shown = PASSAGE;
    else {
      say("Loading the model …");
      await load("model");
      await load(method);
      models[method] ??= LocalGPT.load(EXPLORER_WEIGHTS[method], EXPLORER);
      const model = models[method], {a, g, loss} = LocalGPT.run(model, text, rule);
      model.passage ??= LocalGPT.run(model, passage, rule).loss; // by which to judge the other
      const numbers = HEADS.map((head) => ({
        a: a[head].map((row) => [...row]),
        g: g[head].map((row) => Array.from(row, (v) => 1e6 * v)),
      }));
      const rest = typed.length > longest ? `Read: the first ${longest} characters. ` : "";
      const said = `${rest}L = ${number(loss)} nats a character at iteration ${LAST}, the only one
        whose weights are here (the passage: ${number(model.passage)}; a blind guess among
        ${shapes.size} characters: ${number(Math.log(shapes.size))}).`;
      const inputs = [...text].slice(0, -1); // the last one is only predicted
      shown = {text, key, said, heads: numbers, characters: inputs.map((c) => shapes.get(c))};
    }
    say(shown.said);
  }

  // ---- the pictures: on a dark page, too, on light paper

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
    const T = shown.characters.length, left = 13, side = width - left - 2;
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
    const largest = (name) => Math.max(...made.flat().map((entry) => Math.abs(entry[name]))) || 1;
    const parts = Math.max(...["d", "o", "f"].map(largest));
    const sent = Math.max(parts, largest("sent"));
    return {a: 1, g: largest("g"), ag: largest("ag"), d: parts, o: parts, f: parts, sent};
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
    // Characters, all of them where there is room for letters that can be read.
    const room = cell >= 7;
    context.fillStyle = "black";
    context.font = `${room ? Math.max(9, Math.min(12, cell)) : 12}px monospace`;
    shown.characters.forEach((c, i) => {
      if (room || i === state.query) context.fillText(c, left / 2, (i + 0.5) * cell);
      if (room || i === state.key) context.fillText(c, left + (i + 0.5) * cell, side + 8);
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
    state.query = Math.min(state.query, shown.characters.length - 1);
    state.key = Math.min(state.key, state.query);
    draw();
  }

  function draw() {
    const made = view(state.head, state), limits = limitsOf(view(state.head, UNCHANGED));
    for (const name of NAMES) drawMap(name, made, limits[name]);
    for (const head of HEADS) {
      $(`head [value="${head}"] + span small`).textContent = cosine(view(head, state), "d");
    }
    drawControls(made[state.query][state.key]);
    drawWords(made);
  }

  /* Of a map with f, over all of a head. */
  function cosine(made, name) {
    const [x, f] = [name, "f"].map((name) => made.flat().map((entry) => entry[name]));
    const value = dot(x, f) / Math.sqrt(dot(x, x) * dot(f, f));
    return isNaN(value) ? "not defined" : minus(value.toFixed(2));
  }
  const label = (i) => `${i} ${shown.characters[i]}`;

  function drawControls({a: weight}) {
    for (const name of ["method", "step", "head"]) {
      for (const input of document.getElementsByName(name)) {
        input.checked = input.value === String(state[name]);
        input.disabled = name === "step" && shown.text !== "" && input.value !== String(LAST);
      }
    }
    $("query").max = shown.characters.length - 1;
    $("key").max = state.query;
    for (const name of ["query", "key", "temperature", "constant", "rule"]) {
      $(name).value = state[name];
    }
    $("weight").value = weight; // by hand, or as it is
    if (document.activeElement !== $("text")) $("text").value = state.text;
    const words = {
      query: label(state.query),
      key: label(state.key),
      temperature: number(10 ** state.temperature),
      constant: number(state.constant),
      weight: number(weight),
    };
    for (const [name, value] of Object.entries(words)) {
      $(`${name}-value`).textContent = value;
      $(name).setAttribute("aria-valuetext", value);
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
        f = ${at("f")}. The rule sends ${at("sent")}; over the head, its cosine with f is
        ${cosine(made, "sent")}.`,
    ];
    const text = shown.characters.map((c, i) =>
      element(i === query ? "mark" : i === key ? "u" : "span", {}, c));
    $("readout").replaceChildren(element("p", {"aria-hidden": true, class: "text"}, ...text),
      ...about.map((sentence) => element("p", {}, sentence)));
    const line = (head, kind, cells) => element("tr", {}, element("th", {}, head),
      ...cells.map((cell) => element(kind, {}, cell)));
    $("table").replaceChildren(line("key", "th", NAMES), ...row.map((entry, i) =>
      line(label(i), "td", NAMES.map((name) => number(entry[name])))));
  }

  addEventListener("resize", draw);
  $("corpus").textContent = `of ${EXPLORER.corpus}`;
  // It begins where the address says, as in explorer.html?method=fa&step=0&head=6
  const known = {method: METHODS, step: maps.bp, head: HEADS, rule: SOFTMAX_RULES, text: {}};
  const asked = [...new URLSearchParams(location.search)].filter(([name, value]) =>
    name in known ? value in known[name] : name in START && value && !isNaN(value));
  update({...START, ...Object.fromEntries(asked.map(([n, v]) => [n, isNaN(v) ? v : +v]))});
})();
