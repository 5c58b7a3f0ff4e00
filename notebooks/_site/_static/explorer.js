/* The explorer: from A and g of a head it computes f, d and o, and keeps controls, pictures and address together.
   EXPLORER, the data, is written by 07_explore.ipynb; the model for a text of one's own is in explorer-model.js. */
"use strict";
(() => {
  const {layers, heads, maps, error, opening, settled, positions} = EXPLORER;
  const shapes = new Map(EXPLORER.vocabulary); // how each character is shown
  const METHODS = {bp: "backpropagation", fa: "feedback alignment"};
  const LAST = Object.keys(maps.bp).at(-1);
  const MAPS = {
    a: "Attention A",
    g: "Error g = dL/dA",
    ag: "a g, the addends of b",
    d: "Diagonal d = a (1 − a) g",
    o: "Off-diagonal o = f − d",
    f: "Full f = d + o = a (g − b)",
  };
  const START = {...opening, step: String(opening.step), query: 17, key: 4, beside: "", temperature: 1, constant: 0,
    weight: "", lock: "", text: "", rule: EXPLORER.rule};
  const PRESETS = [
    ["The common mode", {}, `Early in training g has nearly one colour along each row, and so has d; o has the opposite
      one. What is left, f, is small and has both signs in every row.`],
    ["A constant that nobody should see", {constant: 3}, `The same head and the same scales, with three spreads of g added
      to every error: d and o grow, against each other, and f stays as it was.`],
    ["A head that has settled", {...settled, step: String(settled.step)}, `At the end of training its queries look at few
      keys. The others get errors as large, and hardly anything of d, o or f.`],
  ];
  const state = {...START};

  /* Never as HTML: the words may be those of any text. */
  function element(tag, attributes, ...content) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...content);
    return made;
  }
  const $ = (selector) => document.querySelector(`#explorer${selector}`);
  const minus = (words) => words.replaceAll("-", "−");
  const number = (x) => minus((Math.abs(x) < 1e-9 ? 0 : x).toLocaleString("en", {maximumSignificantDigits: 3}));
  const headName = (head) => `L${Math.floor(head / heads)}H${head % heads}`;
  const headNumber = (name) => everyHead.find((head) => headName(head) === name);
  const everyHead = Array.from({length: layers * heads}, (_, head) => head);
  const dot = (x, y) => x.reduce((sum, v, i) => sum + v * y[i], 0);
  const largest = (values) => values.reduce((high, v) => Math.max(high, Math.abs(v)), 0);

  // ---- the numbers ----

  const unpack = (base64, Type) => new Type(Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)).buffer);
  const rowsOf = (triangle, T) => Array.from({length: T}, (_, q) => triangle.slice((q * (q + 1)) / 2, ((q + 1) * (q + 2)) / 2));

  /* A head's lower triangles, row by row: weights that sum to one, and errors in millionths of a nat. */
  function stored(method, step, head) {
    const of = maps[method][step], T = EXPLORER.characters.length, n = (T * (T + 1)) / 2;
    const part = (name, Type) => (of[`${name}s`] ??= unpack(of[name], Type)).subarray(head * n, (head + 1) * n);
    const unit = (1e6 * of.scale[head]) / 32767;
    const a = Float64Array.from(part("a", Uint16Array), (q) => (q / 65535) ** 4);
    return {a: rowsOf(a, T), g: rowsOf(Float64Array.from(part("g", Int16Array), (q) => q * unit), T)};
  }

  const shown = {text: "", key: "", said: ""}; // the text whose maps are there: until a model has loaded, the one before
  const models = {}, runs = {}; // for one's own text, by method

  function own(method, head) {
    const {a, g} = (runs[method] ??= LocalGPT.run(models[method], shown.text, state.rule));
    return {a: a[head], g: g[head].map((row) => row.map((v) => 1e6 * v))};
  }

  const characters = () => (shown.text ? [...shown.text].slice(0, -1).map((c) => shapes.get(c)) : EXPLORER.characters);

  /* A head as it is shown: with temperature, constant and a weight by hand, and all that follows from a and g. */
  function view({method, head}) {
    const {a, g} = shown.text ? own(method, head) : stored(method, state.step, head);
    const all = g.flatMap((row) => [...row]), mean = all.reduce((sum, v) => sum + v, 0) / all.length;
    const constant = state.constant * Math.sqrt(all.reduce((sum, v) => sum + (v - mean) ** 2, 0) / all.length);
    const made = {sums: []};
    for (const name of Object.keys(MAPS)) made[name] = [];
    a.forEach((weights, query) => {
      const highest = Math.max(...weights);
      let row = weights.map((w) => (w / highest) ** (1 / state.temperature));
      const total = row.reduce((sum, w) => sum + w, 0);
      row = row.map((w) => w / total);
      if (state.weight !== "" && query === state.query && query > 0) {
        const others = 1 - row[state.key]; // they keep their proportions
        row = row.map((w, key) => (key === state.key ? +state.weight : (w * (1 - state.weight)) / others));
      }
      const errors = g[query].map((v) => v + constant), b = dot(row, errors);
      const sums = {};
      const add = (name, values) => {
        made[name].push(...values);
        sums[name] = values.reduce((sum, v) => sum + v, 0) / (name === "g" ? values.length : 1);
      };
      add("a", row);
      add("g", errors);
      add("ag", row.map((w, i) => w * errors[i]));
      add("d", row.map((w, i) => w * (1 - w) * errors[i]));
      add("o", row.map((w, i) => -w * (b - w * errors[i])));
      add("f", row.map((w, i) => w * (errors[i] - b)));
      made.sums.push(sums);
    });
    return made;
  }

  // ---- the controls ----

  function radios(fieldset, name, options, content) {
    for (const value of options) {
      const input = element("input", {type: "radio", name, value});
      input.addEventListener("change", () => update({[name]: value}));
      fieldset.append(element("label", {}, input, element("span", {}, ...content(value))));
    }
  }

  radios($("-method"), "method", Object.keys(METHODS), (method) => [METHODS[method]]);
  radios($("-step"), "step", Object.keys(maps.bp), (step) => [step]);
  radios($("-head"), "head", everyHead, (head) => [headName(head), " ", element("small", {})]);
  $("-head").style.setProperty("--heads", heads);
  $("-head").addEventListener("keydown", (event) => {
    // radio buttons know a next and a previous one; here they also have one below and one above
    const rows = {ArrowDown: 1, ArrowUp: -1}[event.key];
    if (!rows) return;
    event.preventDefault();
    $(`-head [value="${state.head + rows * heads}"]`)?.focus();
    document.activeElement.click();
  });
  const options = (select, entries) => select.append(...entries.map(([value, words]) => element("option", {value}, words)));
  options($("-beside"), [["", "nothing"], ["other", "the other model"], ...everyHead.map((h) => [headName(h), headName(h)])]);
  options($("-rule"), Object.entries(SOFTMAX_RULES).map(([rule, {name}]) => [rule, `${name} (${rule})`]));
  for (const name of ["beside", "rule"]) $(`-${name}`).addEventListener("change", ({target}) => update({[name]: target.value}));
  for (const name of ["query", "key", "constant"]) {
    $(`-${name}`).addEventListener("input", ({target}) => update({[name]: target.valueAsNumber}));
  }
  $("-temperature").addEventListener("input", ({target}) => update({temperature: +(10 ** target.value).toFixed(3)}));
  $("-weight").addEventListener("input", ({target}) => update({weight: target.value}));
  $("-by-hand").addEventListener("change", ({target}) => update({weight: target.checked ? $("-weight").value : ""}));
  $("-lock").addEventListener("change", ({target}) => update({lock: target.checked ? limits.join(",") : ""}));
  $("-reset").addEventListener("click", () => update({temperature: 1, constant: 0, weight: ""}));
  let typed;
  $("-text").addEventListener("input", ({target}) => {
    clearTimeout(typed);
    typed = setTimeout(() => update({text: target.value}), 300);
  });
  $("").addEventListener("submit", (event) => event.preventDefault());
  PRESETS.forEach(([title, change, words]) => {
    const button = element("button", {type: "button"}, element("strong", {}, title), " ", words);
    button.addEventListener("click", () => update({...START, ...change}));
    $("-presets").append(button);
  });

  // ---- the address ----

  function read() {
    const change = {...START};
    for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
      if (!(name in START)) continue;
      const parsed = name === "head" ? headNumber(value) : typeof START[name] === "number" ? Number(value) : value;
      const known = {method: METHODS, step: maps.bp, rule: SOFTMAX_RULES}[name];
      const fits = known ? Object.hasOwn(known, parsed) : typeof parsed === typeof START[name] && parsed === parsed;
      if (fits) change[name] = parsed;
    }
    for (const name of ["query", "key"]) change[name] = Math.max(0, Math.floor(change[name]));
    if (!(change.temperature > 0)) change.temperature = 1;
    if (!(+change.weight >= 0 && +change.weight < 1)) change.weight = "";
    return change;
  }

  function write() {
    const changed = Object.entries(state).filter(([name, value]) => value !== START[name]);
    const words = changed.map(([name, value]) => [name, name === "head" ? headName(value) : value]);
    const bare = location.pathname + location.search;
    history.replaceState(null, "", words.length ? `#${new URLSearchParams(words)}` : bare);
  }
  addEventListener("hashchange", () => update(read()));

  // ---- a text of one's own ----

  const script = (name) => new Promise((resolve, reject) => {
    // a page on disk may fetch nothing, but scripts it may have
    const made = element("script", {src: `_static/${name}.js`});
    made.onload = resolve;
    made.onerror = () => reject(new Error(`${name}.js is missing`));
    document.head.append(made);
  });
  const scripts = {};

  const say = (words) => ($("-said").textContent = words);

  /* Makes state.text the one that is shown, as far as it can be. */
  async function readText() {
    const {text, rule} = state, length = [...text].length;
    const wanted = [...new Set(panels().map(({method}) => method))];
    const key = JSON.stringify([text, rule, wanted]);
    if (key === shown.key) return say(shown.said); // back from a text that was refused
    const absent = [...text].find((c) => !shapes.has(c));
    if (absent) return say(`The models know no “${absent}”.`);
    if (text && (length < 3 || length > positions + 1)) return say(`${length} characters: it takes 3 to ${positions + 1}.`);
    if (text && !wanted.every((method) => models[method])) say("Loading the model …");
    try {
      for (const name of text ? ["model", ...wanted] : []) await (scripts[name] ??= script(`explorer-${name}`));
    } catch (problem) {
      return say(`${problem.message}: only the passage can be shown.`);
    }
    if (state.text !== text || state.rule !== rule) return; // it has moved on meanwhile
    for (const method of wanted) if (text) models[method] ??= LocalGPT.load(EXPLORER_WEIGHTS[method], EXPLORER);
    const start = performance.now();
    Object.assign(shown, {text, key, said: ""});
    for (const method of Object.keys(METHODS)) delete runs[method];
    if (text) {
      for (const {method, head} of panels()) own(method, head);
      const spent = Math.round(performance.now() - start), loss = number(runs[state.method].loss);
      shown.said = `L = ${loss} nats a character at iteration ${LAST}; a forward and a backward pass in ${spent} ms.`;
    }
    say(shown.said);
  }

  // ---- the pictures ----

  const panels = () => {
    const {method, head, beside} = state;
    const other = {other: {method: method === "bp" ? "fa" : "bp", head}}[beside] ?? {method, head: headNumber(beside)};
    return beside && other.head !== undefined ? [{method, head}, other] : [{method, head}];
  };
  const panelName = ({method, head}) => `${headName(head)}, ${method.toUpperCase()}`;
  const MAGMA = [[252, 253, 191], [252, 137, 97], [183, 55, 121], [81, 18, 124], [0, 0, 4]];
  const ENDS = { // of the diverging scale; its middle is the page, as is the start of the sequential one
    light: [[[5, 48, 97], [67, 147, 195]], [[214, 96, 77], [103, 0, 31]]],
    dark: [[[166, 213, 255], [38, 112, 184]], [[196, 70, 52], [255, 184, 158]]],
  };
  const COLORS = {light: {d: "#0072B2", o: "#D55E00"}, dark: {d: "#4AA8E0", o: "#FF8A3D"}};
  let theme = {};

  const css = ([r, g, b]) => `rgb(${r}, ${g}, ${b})`;
  /* x from 0 to 1 along some colours. */
  function blend(colors, x) {
    const at = x * (colors.length - 1), i = Math.min(Math.floor(at), colors.length - 2);
    return css(colors[i].map((v, c) => Math.round(v + (at - i) * (colors[i + 1][c] - v))));
  }
  const shade = (v) => Math.sign(v) * Math.sqrt(Math.min(1, Math.abs(v)));

  function canvasOf(place, width, height) {
    const canvas = place.querySelector("canvas"), scale = devicePixelRatio || 1;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.fillStyle = theme.ink;
    context.textAlign = "center";
    context.textBaseline = "middle";
    return context;
  }

  /* Where things are in a map of this width: labels at the left and below, the row's sums at the right. */
  function places(width) {
    const T = characters().length, left = 13, bar = Math.round(width * 0.13);
    const side = width - left - bar - 6;
    return {T, left, side, cell: side / T, bar, middle: width - bar / 2, height: side + 16};
  }

  const views = [], figures = [];

  function newMap(name, panel) {
    const tip = element("div", {class: "tip", hidden: ""});
    const place = element("div", {class: "map", tabindex: 0, role: "application", id: `explorer-map-${name}${panel || ""}`},
      element("canvas", {}), tip);
    const bar = element("div", {class: "bar"}, element("span", {}), element("i", {}), element("span", {}));
    const figure = element("figure", {}, element("figcaption", {}, element("span", {}), bar), place);
    $("-maps").append(figure);
    figures.push({figure, place, name, panel, bar, title: figure.querySelector("figcaption > span")});
    const at = (event) => {
      const box = place.getBoundingClientRect(), {T, left, cell} = places(box.width);
      const key = Math.floor((event.clientX - box.left - left) / cell), query = Math.floor((event.clientY - box.top) / cell);
      return 0 <= key && key <= query && query < T ? {query, key} : null;
    };
    place.addEventListener("click", (event) => at(event) && update(at(event)));
    place.addEventListener("pointermove", (event) => {
      const cell = at(event), box = place.getBoundingClientRect();
      tip.hidden = !cell;
      if (!cell) return;
      tip.textContent = values(views[panel], cell.query, cell.key);
      tip.style.left = `${Math.max(0, Math.min(event.clientX - box.left - 60, box.width - tip.offsetWidth))}px`;
      tip.style.top = `${event.clientY - box.top + 18}px`;
    });
    place.addEventListener("pointerleave", () => (tip.hidden = true));
    place.addEventListener("keydown", (event) => {
      const move = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
      if (!move) return;
      event.preventDefault();
      const query = state.query + move[0], key = Math.min(state.key, query) + move[1];
      if (0 <= key && key <= query && query < characters().length) update({query, key});
    });
  }
  for (const name of Object.keys(MAPS)) for (const panel of [0, 1]) newMap(name, panel);

  const label = (i) => `${i} ${characters()[i]}`;
  function values(made, query, key) {
    const at = (query * (query + 1)) / 2 + key;
    const each = Object.keys(MAPS).map((name) => `${{a: "A", ag: "a g"}[name] ?? name} ${number(made[name][at])}`);
    return `query ${label(query)}, key ${label(key)}\n${each.join(", ")}`;
  }

  let limits = [];
  /* What full colour and full bars stand for: of g, of a g, of the three parts; of the rows' sums. */
  function measure() {
    const high = (...names) => largest(views.flatMap((made) => names.map((name) => largest(made[name]))));
    const sums = (...names) => largest(views.flatMap((made) => made.sums.flatMap((row) => names.map((name) => row[name]))));
    const now = [high("g"), high("ag"), high("d", "o", "f"), sums("g"), sums("ag"), sums("d", "o", "f")];
    const kept = state.lock.split(",").map(Number);
    limits = kept.length === now.length && kept.every((v) => v > 0) ? kept : now.map((v) => Number(v.toPrecision(4)) || 1);
  }
  const GROUPS = {g: 0, ag: 1, d: 2, o: 2, f: 2}; // with a scale of their own
  const limitOf = (name, ofSums = false) => (name === "a" ? 1 : limits[GROUPS[name] + 3 * ofSums]);

  function drawMap({figure, place, name, panel, bar, title}) {
    figure.hidden = panel >= views.length;
    if (figure.hidden) return;
    const made = views[panel], width = place.clientWidth, {T, left, side, cell, bar: room, middle, height} = places(width);
    const context = canvasOf(place, width, height), high = limitOf(name);
    const colors = name === "a" ? theme.sequential : theme.diverging;
    made.sums.forEach((sums, query) => {
      for (let key = 0; key <= query; key++) {
        const v = shade(made[name][(query * (query + 1)) / 2 + key] / high);
        context.fillStyle = blend(colors, name === "a" ? v : (v + 1) / 2);
        context.fillRect(left + key * cell, query * cell, cell + 0.5, cell + 0.5);
      }
      const length = (Math.max(-1, Math.min(1, sums[name] / limitOf(name, true))) * room) / 2;
      context.fillStyle = theme.ink;
      context.fillRect(Math.min(middle, middle + length), query * cell + cell * 0.15, Math.abs(length), cell * 0.7);
    });
    context.font = "11px sans-serif";
    context.fillText({a: "Σ = 1", g: "mean", ag: "b = Σ"}[name] ?? `Σ ${name}`, left + side - 18, 8);
    context.fillRect(middle - 0.5, 0, 1, side);
    context.font = `${Math.max(7, Math.min(12, cell * 1.35))}px monospace`;
    characters().forEach((c, i) => {
      context.fillText(c, left / 2, (i + 0.5) * cell);
      context.fillText(c, left + (i + 0.5) * cell, side + 8);
    });
    for (const [x, n] of [[0, state.query + 1], [state.key, 1]]) {
      for (const [color, line] of [[theme.ground, 3], [theme.ink, 1]]) {
        context.strokeStyle = color;
        context.lineWidth = line;
        context.strokeRect(left + x * cell - 1.5, state.query * cell - 1.5, n * cell + 3, cell + 3); // around it, not on it
      }
    }
    title.textContent = views.length > 1 ? `${MAPS[name].split(/ = |,/)[0]} · ${panelName(panels()[panel])}` : MAPS[name];
    place.setAttribute("aria-label", `${title.textContent}: arrow keys move the query and the key`);
    const stops = Array.from({length: 9}, (_, i) => blend(colors, i / 8));
    bar.children[0].textContent = name === "a" ? "0" : minus(`-${number(high)}`);
    bar.children[1].style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
    bar.children[2].textContent = number(high);
  }

  /* The picked row: for every key d from zero, o from where d ends, f from zero. */
  function drawRow(place, made) {
    const width = place.clientWidth, height = 170, left = 42, bottom = 20, n = state.query + 1;
    const context = canvasOf(place, width, height), start = (state.query * n) / 2;
    const row = Object.fromEntries(["d", "o", "f"].map((name) => [name, made[name].slice(start, start + n)]));
    const high = Math.max(...row.d, ...row.f, 0), low = Math.min(...row.d, ...row.f, 0), span = high - low || 1;
    const y = (v) => 6 + ((high - v) / span) * (height - bottom - 12), step = (width - left) / Math.max(n, 8);
    for (let key = 0; key < n; key++) {
      const x = left + key * step;
      for (const [shift, color, from, to] of [[0.1, theme.d, 0, row.d[key]], [0.37, theme.o, row.d[key], row.f[key]], [0.64, theme.ink, 0, row.f[key]]]) {
        context.fillStyle = color;
        context.fillRect(x + shift * step, Math.min(y(from), y(to)), step * 0.25, Math.max(0.5, Math.abs(y(to) - y(from))));
      }
      context.fillStyle = theme.ink;
      context.font = `${key === state.key ? "bold " : ""}12px monospace`;
      context.fillText(characters()[key], x + step / 2, height - bottom / 2);
    }
    context.fillRect(left, y(0), width - left, 0.7);
    context.font = "11px sans-serif";
    context.textAlign = "right";
    for (const v of [high, 0, low]) if (v === 0 || Math.abs(y(v) - y(0)) > 12) context.fillText(number(v), left - 5, y(v));
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
    write();
  }

  function draw() {
    views.splice(0, 2, ...panels().map(view));
    measure();
    $("-maps").classList.toggle("pairs", views.length > 1);
    $("-rows").classList.toggle("pairs", views.length > 1);
    figures.forEach(drawMap);
    [...$("-rows").children].forEach((place, panel) => {
      place.hidden = panel >= views.length;
      if (!place.hidden) drawRow(place, views[panel]);
    });
    for (const head of everyHead) {
      const {d, f} = view({method: state.method, head});
      const cosine = dot(d, f) / Math.sqrt(dot(d, d) * dot(f, f));
      $(`-head [value="${head}"] + span small`).textContent = minus(cosine.toFixed(2));
    }
    drawControls();
    drawWords();
  }

  function drawControls() {
    for (const name of ["method", "step", "head"]) {
      for (const input of document.getElementsByName(name)) input.checked = input.value === String(state[name]);
    }
    for (const input of document.getElementsByName("step")) input.disabled = shown.text && input.value !== LAST;
    $("-query").max = characters().length - 1;
    $("-key").max = state.query;
    for (const name of ["query", "key", "constant", "beside", "rule"]) $(`-${name}`).value = state[name];
    $("-temperature").value = Math.log10(state.temperature);
    if (state.weight !== "") $("-weight").value = state.weight;
    $("-by-hand").checked = state.weight !== "";
    $("-weight").disabled = state.weight === "";
    $("-lock").checked = state.lock !== "";
    $("-rule").disabled = !shown.text;
    if (document.activeElement !== $("-text")) $("-text").value = state.text;
    const words = {query: label(state.query), key: label(state.key), temperature: number(state.temperature),
      constant: number(state.constant), weight: state.weight === "" ? "as it is" : `= ${number(+state.weight)}`};
    for (const [name, value] of Object.entries(words)) {
      $(`-${name}-value`).textContent = value;
      $(`-${name}`).setAttribute("aria-valuetext", value);
    }
    const chosen = PRESETS.map(([, change]) => ({...START, ...change}));
    [...$("-presets").children].forEach((button, i) =>
      button.setAttribute("aria-pressed", Object.keys(START).every((name) => chosen[i][name] === state[name])));
  }

  function drawWords() {
    const {query, key} = state, made = views[0], sums = made.sums[query], start = (query * (query + 1)) / 2;
    const at = (name) => number(made[name][start + key]);
    const about = [
      `${headName(state.head)}, ${METHODS[state.method]}, iteration ${state.step}. Query ${label(query)}: lateral sum
        b = ${number(sums.ag)}; over its keys d sums to ${number(sums.d)} and o to ${number(sums.o)}.`,
      `Key ${label(key)}: A = ${at("a")}, g = ${at("g")}; d = ${at("d")} and o = ${at("o")} make f = ${at("f")}.`,
    ];
    $("-readout").replaceChildren(...about.map((sentence) => element("p", {}, sentence)));
    const names = Object.keys(MAPS);
    const heading = ["key", ...names].map((name) => element("th", {scope: "col"}, name));
    const rows = Array.from({length: query + 1}, (_, i) => element("tr", {}, element("th", {scope: "row"}, label(i)),
      ...names.map((name) => element("td", {}, number(made[name][start + i])))));
    $("-table").replaceChildren(element("thead", {}, element("tr", {}, ...heading)), element("tbody", {}, ...rows));
  }

  /* Canvases do not inherit colours: take those of the page, and again whenever the theme changes. */
  function paint() {
    const {color} = getComputedStyle(document.body), ground = getComputedStyle(document.body).backgroundColor;
    const rgb = ground.match(/[\d.]+/g).slice(0, 3).map(Number);
    const kind = rgb[0] + rgb[1] + rgb[2] < 384 ? "dark" : "light";
    const [low, high] = ENDS[kind];
    const sequential = [rgb, ...(kind === "dark" ? MAGMA.toReversed() : MAGMA).slice(1)];
    theme = {ink: color, ground, sequential, diverging: [...low, rgb, ...high], ...COLORS[kind]};
    if (views.length) draw();
  }
  new MutationObserver(paint).observe(document.body, {attributeFilter: ["data-theme"]});
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (views.length && Math.abs(entry.contentRect.width - width) > 1) draw();
    width = entry.contentRect.width;
  }).observe($("-maps"));

  $("-corpus").textContent = `of ${EXPLORER.corpus}`;
  const percent = number(100 * error);
  $("-error").textContent =
    `Against 64-bit numbers, they are off by at most ${percent} % of the largest |f| of their head.`;
  paint();
  views.push(view(state));
  measure();
  PRESETS[1][1].lock = limits.join(",");
  update(read());
})();
