/* The report's GPT in plain script, one sentence forwards and backwards, as model_local.py has it.
   For the explorer, with softmax-rules.js: nothing is learnt here, so no weight gets a gradient;
   errors go back as far as every head's g. A matrix is {rows, columns, values}, row after row;
   activations are (T, C) in the same way. */
"use strict";
const LocalGPT = (() => {
  const add = (x, ...more) => x.map((value, i) => more.reduce((total, y) => total + y[i], value));
  /* The i-th of the pieces of length n in an array: a view, which can be written to. */
  const piece = (x, i, n) => x.subarray(i * n, (i + 1) * n);
  function addTo(x, factor, y) {
    for (let i = 0; i < x.length; i++) x[i] += factor * y[i];
  }

  // ---- the weights ----

  /* The matrices in PyTorch's order; each row is whole numbers times the row's step. */
  function load(stored, {layers, heads, channels: C, positions, vocabulary}) {
    const values = unpack(stored.values, Int16Array), steps = unpack(stored.steps, Float32Array);
    let value = 0, step = 0;
    function matrix(rows, columns) {
      const own = new Float32Array(rows * columns);
      for (let i = 0; i < own.length; i++) {
        own[i] = values[value++] * steps[step + Math.floor(i / columns)];
      }
      step += rows;
      return {rows, columns, values: own};
    }
    /* y = x W^T; its error returns through W itself, or through a feedback matrix of its own. */
    function linear(rows, columns) {
      const W = matrix(rows, columns);
      return {W, B: stored.feedback ? matrix(rows, columns) : W};
    }
    const ids = new Map(vocabulary.map(([character], id) => [character, id])), V = ids.size;
    const model = {C, heads, ids, tokens: matrix(V, C), places: matrix(positions, C), blocks: []};
    for (let layer = 0; layer < layers; layer++) {
      const block = {norm1: matrix(1, C).values};
      for (const name of ["q", "k", "v", "o"]) block[name] = linear(C, C);
      block.norm2 = matrix(1, C).values;
      block.up = linear(4 * C, C);
      block.down = linear(C, 4 * C);
      model.blocks.push(block);
    }
    model.norm = matrix(1, C).values;
    model.head = linear(V, C);
    return model;
  }

  // ---- its parts, forwards and backwards ----

  function forwards({W: {rows, columns, values}}, x) {
    return Float64Array.from({length: (x.length / columns) * rows}, (_, i) =>
      dot(piece(values, i % rows, columns), piece(x, Math.floor(i / rows), columns)));
  }

  function backwards({B: {rows, columns, values}}, dy) {
    const dx = new Float64Array((dy.length / rows) * columns);
    dy.forEach((error, i) =>
      addTo(piece(dx, Math.floor(i / rows), columns), error, piece(values, i % rows, columns)));
    return dx;
  }

  function layerNorm(x, gain) {
    const C = gain.length, unit = new Float64Array(x.length), sizes = [];
    for (let t = 0; t < x.length / C; t++) {
      const row = piece(x, t, C), average = sum(row) / C;
      sizes.push(Math.sqrt(sum(row.map((v) => (v - average) ** 2)) / C + 1e-5));
      piece(unit, t, C).set(row.map((v) => (v - average) / sizes[t]));
    }
    return {y: unit.map((u, i) => u * gain[i % C]), unit, sizes, gain};
  }

  function layerNormBack({unit, sizes, gain}, dy) {
    const C = gain.length, dx = new Float64Array(dy.length);
    sizes.forEach((size, t) => {
      const error = piece(dy, t, C).map((e, c) => e * gain[c]), u = piece(unit, t, C);
      const plain = sum(error) / C, along = dot(error, u) / C; // what moves the mean, and the size
      piece(dx, t, C).set(error.map((e, c) => (e - plain - along * u[c]) / size));
    });
    return dx;
  }

  /* The normal distribution function, by the erfc of Numerical Recipes, good to 1.2e-7. */
  const ERFC = [-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807,
    -1.13520398, 1.48851587, -0.82215223, 0.17087277];
  function below(x) {
    const z = Math.abs(x) / Math.SQRT2, t = 1 / (1 + z / 2);
    const tail = (t / 2) * Math.exp(ERFC.reduceRight((total, c) => total * t + c, 0) - z * z);
    return x > 0 ? 1 - tail : tail;
  }
  const gelu = (x) => x * below(x);
  const geluSlope = (x) => below(x) + (x * Math.exp((-x * x) / 2)) / Math.sqrt(2 * Math.PI);

  /* Every head's weights a (rows of the lower triangle), and what the heads read from the values.
     Of a token's channels a head sees piece t * heads + head. */
  function attend(block, x, {C, heads}) {
    const D = C / heads, [q, k, v] = ["q", "k", "v"].map((name) => forwards(block[name], x));
    const out = new Float64Array(x.length), a = [];
    for (let head = 0; head < heads; head++) {
      const at = (values, t) => piece(values, t * heads + head, D);
      a.push(Array.from({length: x.length / C}, (_, t) => {
        const score = (_, j) => dot(at(q, t), at(k, j)) / Math.sqrt(D);
        const weights = softmax(Float64Array.from({length: t + 1}, score));
        weights.forEach((w, j) => addTo(at(out, t), w, at(v, j)));
        return weights;
      }));
    }
    return {q, k, v, a, out};
  }

  /* From the error at what the heads have read: g of every head, and the error at the block's
     normed input. */
  function attendBack(block, {q, k, v, a}, dOut, {C, heads}, rule) {
    const D = C / heads, [dq, dk, dv] = [q, k, v].map((x) => new Float64Array(x.length));
    const g = a.map((rows, head) => rows.map((weights, t) => {
      const at = (values, t) => piece(values, t * heads + head, D);
      const errors = weights.map((_, j) => dot(at(dOut, t), at(v, j)));
      weights.forEach((w, j) => addTo(at(dv, j), w, at(dOut, t)));
      SOFTMAX_RULES[rule].send(weights, errors).forEach((ds, j) => {
        addTo(at(dq, t), ds / Math.sqrt(D), at(k, j));
        addTo(at(dk, j), ds / Math.sqrt(D), at(q, t));
      });
      return errors;
    }));
    return {g, dx: add(backwards(block.q, dq), backwards(block.k, dk), backwards(block.v, dv))};
  }

  // ---- the whole ----

  /* A text of T + 1 characters, the last of them only predicted. Of every head, layer by layer: a
     and g = dL/da as rows of the lower triangle; and the loss L, the mean over the T predictions in
     nats. */
  function run(model, text, rule) {
    const {C, tokens, places, blocks} = model, ids = [...text].map((c) => model.ids.get(c));
    const T = ids.length - 1, V = tokens.rows;
    let x = new Float64Array(T * C);
    for (let t = 0; t < T; t++) {
      piece(x, t, C).set(add(piece(tokens.values, ids[t], C), piece(places.values, t, C)));
    }
    const kept = blocks.map((block) => {
      const norm1 = layerNorm(x, block.norm1), attention = attend(block, norm1.y, model);
      x = add(x, forwards(block.o, attention.out));
      const norm2 = layerNorm(x, block.norm2), hidden = forwards(block.up, norm2.y);
      x = add(x, forwards(block.down, hidden.map(gelu)));
      return {norm1, attention, norm2, hidden};
    });
    // The error of the loss at the logits.
    const norm = layerNorm(x, model.norm), logits = forwards(model.head, norm.y);
    let loss = 0;
    for (let t = 0; t < T; t++) {
      const row = piece(logits, t, V), p = softmax(row), next = ids[t + 1];
      loss -= Math.log(p[next]) / T;
      row.set(p.map((p, i) => (p - (i === next)) / T));
    }
    // And back, block by block.
    let dx = layerNormBack(norm, backwards(model.head, logits));
    const g = [];
    for (let layer = blocks.length - 1; layer >= 0; layer--) {
      const block = blocks[layer], {norm1, attention, norm2, hidden} = kept[layer];
      const dHidden = backwards(block.down, dx).map((e, i) => e * geluSlope(hidden[i]));
      dx = add(dx, layerNormBack(norm2, backwards(block.up, dHidden)));
      const back = attendBack(block, attention, backwards(block.o, dx), model, rule);
      dx = add(dx, layerNormBack(norm1, back.dx));
      g.unshift(...back.g);
    }
    return {a: kept.flatMap(({attention}) => attention.a), g, loss};
  }

  return {load, run};
})();
