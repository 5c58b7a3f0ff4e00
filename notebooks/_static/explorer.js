/* The explorer: decodes A and g, computes f, d and o from them, and keeps controls and pictures together.
   Bokeh draws; EXPLORER, the data, is written by 07_explore.ipynb. */
"use strict";
(() => {
  const {characters, layers, heads, maps, error} = EXPLORER;
  const T = characters.length;
  const METHODS = {bp: "backpropagation", fa: "feedback alignment"};
  const MAPS = {
    a: "Attention A",
    g: "Error g = dL/dA",
    f: "Full f = a (g − b)",
    d: "Diagonal d = a (1 − a) g",
    o: "Off-diagonal o = f − d",
    error: "Error of the diagonal, |d − f|",
  };
  const state = {method: "fa", step: "500", head: 4, query: 21, key: 13};
  /* Never as HTML: the words may be those of any text. */
  function element(tag, attributes, ...content) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...content);
    return made;
  }
  const $ = (selector) => document.querySelector(`#explorer${selector}`);
  const number = (x) => x.toLocaleString("en", {maximumSignificantDigits: 3}).replace("-", "−");

  // ---- the numbers ----

  const unpack = (base64, Type) => new Type(Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)).buffer);

  /* One head's lower triangle as columns, a row of the attention map after the other. */
  function columns(method, step, head) {
    const stored = maps[method][step];
    const n = (T * (T + 1)) / 2;
    const A = (stored.weights ??= unpack(stored.a, Uint16Array)).subarray(head * n, (head + 1) * n);
    const unit = (1e6 * stored.scale[head]) / 32767; // gradients in millionths of a nat
    const errors = (stored.errors ??= unpack(stored.g, Int16Array)).subarray(head * n, (head + 1) * n);
    const g = Array.from(errors, (q) => q * unit);
    const c = {query: [], key: [], a: [], g, f: [], d: [], o: [], error: []};
    for (let query = 0, start = 0; query < T; start += ++query) {
      const row = A.subarray(start, start + query + 1);
      const total = row.reduce((sum, q) => sum + q, 0);
      const a = Array.from(row, (q) => q / total); // quantised weights no longer sum to one
      const b = a.reduce((sum, w, i) => sum + w * g[start + i], 0);
      a.forEach((w, key) => {
        const own = g[start + key];
        const f = w * (own - b), d = w * (1 - w) * own, o = -w * (b - w * own);
        const cell = {query, key, a: w, f, d, o, error: Math.abs(d - f)};
        for (const [name, value] of Object.entries(cell)) c[name].push(value);
      });
    }
    return c;
  }

  const dot = (x, y) => x.reduce((sum, v, i) => sum + v * y[i], 0);
  const largest = (...lists) => Math.max(...lists.flat().map(Math.abs));

  // ---- the controls ----

  function radios(fieldset, name, options, content) {
    for (const value of options) {
      const input = element("input", {type: "radio", name, value});
      input.checked = value === state[name];
      input.addEventListener("change", () => update({[name]: value}));
      fieldset.append(element("label", {}, input, element("span", {}, ...content(value))));
    }
  }

  radios($("-method"), "method", Object.keys(METHODS), (method) => [METHODS[method]]);
  radios($("-step"), "step", Object.keys(maps.bp), (step) => [step]);
  const everyHead = Array.from({length: layers * heads}, (_, head) => head);
  const headName = (head) => `${Math.floor(head / heads)}.${head % heads}`;
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
  for (const name of ["query", "key"]) {
    $(`-${name}`).addEventListener("input", (event) => update({[name]: event.target.valueAsNumber}));
  }

  // ---- the pictures ----

  const cells = new Bokeh.ColumnDataSource();
  const bars = new Bokeh.ColumnDataSource();
  const marks = new Bokeh.ColumnDataSource();
  const figures = new Map(); // and the elements that they go into

  function newFigure(place, options) {
    const fig = Bokeh.Plotting.figure({tools: [], toolbar_location: null, sizing_mode: "stretch_width", min_border: 2,
      background_fill_color: null, border_fill_color: null, outline_line_color: null, ...options});
    fig.grid.grid_line_color = null;
    fig.axis.axis_line_color = null;
    fig.axis.major_tick_line_color = null;
    fig.axis.minor_tick_line_color = null;
    figures.set(fig, place);
    return fig;
  }

  function label(axis) {
    axis.ticker = new Bokeh.FixedTicker({ticks: characters.map((_, i) => i)});
    axis.major_label_overrides = new Map(characters.map((c, i) => [i, c]));
    axis.major_label_standoff = 1;
    axis.major_label_text_font = "monospace";
    axis.major_label_text_font_size = "9px";
  }

  const VALUES = [["query", "@query_name"], ["key", "@key_name"], ["A", "@a{0.0000}"],
    ["g", "@g{0,0.000}"], ["d", "@d{0,0.000}"], ["o", "@o{0,0.000}"], ["f = d + o", "@f{0,0.000}"]];
  const hover = (renderer) => new Bokeh.HoverTool({tooltips: VALUES, renderers: [renderer]});

  function newMap(name, title) {
    const place = element("div", {class: "map", id: `explorer-map-${name}`, tabindex: 0, role: "application",
      "aria-label": `${title}: arrow keys move the query and the key`});
    const values = element("div", {}, element("small", {class: "scale"}), " ", element("small", {class: "here"}));
    $("-maps").append(element("figure", {}, element("figcaption", {}, title, values), place));
    const range = {start: -0.6, end: T - 0.4};
    const fig = newFigure(place, {aspect_ratio: 1, x_range: new Bokeh.Range1d(range),
      y_range: new Bokeh.Range1d({start: range.end, end: range.start})});
    label(fig.xaxis);
    label(fig.yaxis);
    const sequential = name === "a" || name === "error";
    const {viridis, interp_palette, RdBu11} = Bokeh.Palettes;
    const palette = sequential ? viridis(256) : interp_palette(RdBu11, 255);
    const transform = new Bokeh.LinearColorMapper({palette, low: sequential ? 0 : -1, high: 1});
    const field = {x: {field: "key"}, y: {field: "query"}, width: 1, height: 1};
    const color = {field: `${name}_shade`, transform};
    // a hairline of its own colour closes the gaps between cells
    fig.add_tools(hover(fig.rect({...field, fill_color: color, line_color: color, line_width: 0.5, source: cells})));
    for (const [line_color, line_width] of [["black", 3], ["white", 1]]) {
      const outline = {x: {field: "x"}, y: {field: "y"}, width: {field: "width"}, height: 1};
      fig.rect({...outline, fill_color: null, line_color, line_width, source: marks});
    }
    fig.on_event("tap", ({x, y}) => pick(Math.round(y), Math.round(x)));
    place.addEventListener("keydown", (event) => {
      const move = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
      if (!move) return;
      event.preventDefault();
      pick(state.query + move[0], Math.min(state.key, state.query + move[0]) + move[1]);
    });
  }

  function pick(query, key) {
    if (0 <= key && key <= query && query < T) update({query, key});
  }

  const ranges = {x_range: new Bokeh.Range1d(), y_range: new Bokeh.DataRange1d()};
  const rowFigure = newFigure($("-row > div"), {height: 230, ...ranges});
  // each bar's colour (as in the notebooks), its shift to the side, and where it starts and ends
  const parts = {d: ["#0072B2", -0.27, "zero", "d"], o: ["#D55E00", 0, "d", "f"], f: ["#888888", 0.27, "zero", "f"]};
  const bar = {};
  for (const [name, [fill_color, shift, bottom, top]] of Object.entries(parts)) {
    const x = {field: "key", transform: new Bokeh.Dodge({value: shift})};
    const height = {bottom: {field: bottom}, top: {field: top}};
    bar[name] = rowFigure.vbar({x, ...height, width: 0.25, fill_color, line_color: null, source: bars});
  }
  rowFigure.add_tools(hover(bar.d));
  label(rowFigure.xaxis);
  rowFigure.xaxis.major_label_text_font_size = "12px";
  rowFigure.yaxis.formatter = new Bokeh.BasicTickFormatter({use_scientific: false});
  rowFigure.yaxis.ticker = new Bokeh.BasicTicker({desired_num_ticks: 4});
  for (const [name, title] of Object.entries(MAPS)) newMap(name, title);

  // ---- keeping them together ----

  function update(change) {
    Object.assign(state, change);
    state.key = Math.min(state.key, state.query);
    const moved = "query" in change || "key" in change;
    if (!moved && !("head" in change)) drawCosines();
    if (!moved) drawHead();
    drawRow();
  }

  /* On a small screen the map may be all that is in sight, so it says its picked value itself. */
  function caption(name, part, words) {
    $(`-map-${name}`).previousElementSibling.querySelector(`.${part}`).textContent = words;
  }

  function drawCosines() {
    for (const head of everyHead) {
      const {d, f} = columns(state.method, state.step, head);
      const cosine = dot(d, f) / Math.sqrt(dot(d, d) * dot(f, f));
      $(`-head [value="${head}"] + span small`).textContent = cosine.toFixed(2).replace("-", "−");
    }
  }

  function drawHead() {
    const c = columns(state.method, state.step, state.head);
    const limit = largest(c.f, c.d, c.o); // one scale for what is to be compared
    const limits = {a: 1, g: largest(c.g), f: limit, d: limit, o: limit, error: limit};
    for (const [name, high] of Object.entries(limits)) {
      c[`${name}_shade`] = c[name].map((v) => Math.sign(v) * Math.sqrt(Math.abs(v) / high));
      const low = name === "a" || name === "error" ? "0" : `−${number(high)}`;
      caption(name, "scale", `${low} to ${number(high)},`);
    }
    c.query_name = c.query.map((i) => `${i} ${characters[i]}`);
    c.key_name = c.key.map((i) => `${i} ${characters[i]}`);
    c.zero = c.key.map(() => 0);
    cells.data = c;
  }

  function drawRow() {
    const {query, key} = state;
    const start = (query * (query + 1)) / 2;
    const row = {};
    for (const [name, values] of Object.entries(cells.data)) row[name] = values.slice(start, start + query + 1);
    bars.data = row;
    marks.data = {x: [query / 2, key], y: [query, query], width: [query + 1, 1]};
    rowFigure.x_range.setv({start: -0.7, end: Math.max(query, 7) + 0.7});
    for (const name of ["query", "key"]) {
      const slider = $(`-${name}`);
      slider.max = name === "query" ? T - 1 : query;
      slider.value = state[name];
      slider.previousElementSibling.textContent = `${state[name]} ${characters[state[name]]}`;
      slider.setAttribute("aria-valuetext", slider.previousElementSibling.textContent);
    }
    const sum = (values) => number(values.reduce((total, v) => total + v, 0));
    const at = (name) => number(row[name][key]);
    for (const name of Object.keys(MAPS)) caption(name, "here", `picked ${at(name)}`);
    const about = [
      `Head ${headName(state.head)}, ${METHODS[state.method]}, step ${state.step}. Query ${row.query_name[key]}: lateral sum
        b = ${number(dot(row.a, row.g))}; over its keys d sums to ${sum(row.d)} and o to ${sum(row.o)}.`,
      `Key ${row.key_name[key]}: A = ${at("a")}, g = ${at("g")}; d = ${at("d")} and o = ${at("o")} make f = ${at("f")}.`,
    ];
    $("-readout").replaceChildren(...about.map((sentence) => element("p", {}, sentence)));
    const names = ["a", "g", "d", "o", "f"];
    const heading = ["key", ...names].map((name) => element("th", {scope: "col"}, name));
    const rows = row.key.map((i) => element("tr", {}, element("th", {scope: "row"}, row.key_name[i]),
      ...names.map((name) => element("td", {}, number(row[name][i])))));
    $("-table").replaceChildren(element("thead", {}, element("tr", {}, ...heading)), element("tbody", {}, ...rows));
  }

  /* Canvases do not inherit colours: take those of the page, and again whenever the theme changes. */
  function paint() {
    const {color} = getComputedStyle(document.body);
    for (const fig of figures.keys()) fig.axis.major_label_text_color = color;
    bar.f.glyph.fill_color = color;
  }
  new MutationObserver(paint).observe(document.body, {attributeFilter: ["data-theme"]});
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);

  const percent = number(100 * error);
  $("-error").textContent =
    `Against 64-bit numbers, they are off by at most ${percent} % of the largest |f| of their head.`;
  update({});
  paint();
  const page = new Bokeh.Document(); // one for all figures, since they share their data
  for (const fig of figures.keys()) page.add_root(fig);
  Bokeh.embed.add_document_standalone(page, document.body, [...figures.values()]).then(() => {
    for (const place of figures.values()) place.firstChild.tabIndex = -1; // one stop of the Tab key a map, not two
  });
})();
