/* The report's GPT in plain script, one sentence forwards and backwards, as model_local.py has it.
   For the explorer, with softmax-rules.js: nothing is learnt here, so no weight gets a gradient; errors go back as far as
   every head's g.
   A matrix is {rows, columns, values}, row after row; activations are (T, C) in the same way. */
"use strict";
const LocalGPT = (() => {
  const numbers = (base64, Type) => new Type(Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)).buffer);
  const sum = (row) => row.reduce((total, x) => total + x, 0);

  // ---- the weights ----

  /* The Mersenne Twister of Matsumoto and Nishimura (1998), which torch and NumPy draw from: 32 bits a call. */
  function mersenneTwister(seed) {
    const N = 624, state = Uint32Array.of(seed, ...Array(N - 1));
    for (let i = 1; i < N; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
    let next = N;
    return () => {
      if (next === N) {
        next = 0;
        for (let i = 0; i < N; i++) {
          const y = (state[i] & 0x80000000) | (state[(i + 1) % N] & 0x7fffffff);
          state[i] = state[(i + 397) % N] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
        }
      }
      let y = state[next++];
      y ^= y >>> 11;
      y ^= (y << 7) & 0x9d2c5680;
      y ^= (y << 15) & 0xefc60000;
      return (y ^ (y >>> 18)) >>> 0;
    };
  }

  /* Normal numbers as torch makes them on a CPU: sixteen uniform ones (of 24 bits) at a time, by Box and Muller. */
  function normals({seed, taken, std}) {
    const draw = mersenneTwister(seed);
    for (let i = 0; i < taken; i++) draw();
    return (size) => {
      const values = new Float32Array(size);
      for (let start = 0; start < size; start += 16) {
        const u = Array.from({length: 16}, () => (draw() & 0xffffff) / 2 ** 24);
        for (let i = 0; i < 8; i++) {
          const radius = std * Math.sqrt(-2 * Math.log(1 - u[i])), angle = 2 * Math.PI * u[i + 8];
          values[start + i] = radius * Math.cos(angle);
          values[start + i + 8] = radius * Math.sin(angle);
        }
      }
      return values;
    };
  }

  /* The parameters in PyTorch's order; each row is whole numbers times the row's step. */
  function load(stored, {layers, heads, channels: C, positions, vocabulary}) {
    const values = numbers(stored.values, Int16Array), steps = numbers(stored.steps, Float32Array);
    const feedback = stored.feedback && normals(stored.feedback);
    let value = 0, row = 0;
    function matrix(rows, columns) {
      const own = new Float32Array(rows * columns);
      for (let i = 0; i < own.length; i++) own[i] = values[value++] * steps[row + Math.floor(i / columns)];
      row += rows;
      return {rows, columns, values: own};
    }
    /* y = x W^T; its error returns through W itself (backpropagation) or through what the seed draws (alignment). */
    function linear(rows, columns) {
      const W = matrix(rows, columns);
      return {W, B: feedback ? {rows, columns, values: feedback(rows * columns)} : W};
    }
    const V = vocabulary.length, ids = new Map(vocabulary.map(([character], id) => [character, id]));
    const model = {C, heads, ids, tokens: matrix(V, C), places: matrix(positions, C), blocks: []};
    for (let layer = 0; layer < layers; layer++) {
      const block = {norm1: matrix(1, C).values};
      for (const name of ["q", "k", "v", "o"]) block[name] = linear(C, C);
      Object.assign(block, {norm2: matrix(1, C).values, up: linear(4 * C, C), down: linear(C, 4 * C)});
      model.blocks.push(block);
    }
    model.norm = matrix(1, C).values;
    model.head = linear(V, C);
    return model;
  }

  // ---- its parts, forwards and backwards ----

  function forwards({W: {rows, columns, values}}, x) {
    const T = x.length / columns, y = new Float64Array(T * rows);
    for (let t = 0; t < T; t++) {
      for (let r = 0; r < rows; r++) {
        let total = 0;
        for (let c = 0; c < columns; c++) total += values[r * columns + c] * x[t * columns + c];
        y[t * rows + r] = total;
      }
    }
    return y;
  }

  function backwards({B: {rows, columns, values}}, dy) {
    const T = dy.length / rows, dx = new Float64Array(T * columns);
    for (let t = 0; t < T; t++) {
      for (let r = 0; r < rows; r++) {
        const error = dy[t * rows + r];
        for (let c = 0; c < columns; c++) dx[t * columns + c] += error * values[r * columns + c];
      }
    }
    return dx;
  }

  const add = (x, ...more) => x.map((value, i) => more.reduce((total, y) => total + y[i], value));

  function layerNorm(x, gain) {
    const C = gain.length, unit = new Float64Array(x.length), sizes = [];
    for (let start = 0; start < x.length; start += C) {
      const row = x.subarray(start, start + C);
      const average = sum(row) / C;
      const size = Math.sqrt(row.reduce((total, v) => total + (v - average) ** 2, 0) / C + 1e-5);
      for (let c = 0; c < C; c++) unit[start + c] = (row[c] - average) / size;
      sizes.push(size);
    }
    return {y: unit.map((u, i) => u * gain[i % C]), unit, sizes, gain};
  }

  function layerNormBack({unit, sizes, gain}, dy) {
    const C = gain.length, dx = new Float64Array(dy.length);
    for (let start = 0; start < dy.length; start += C) {
      let plain = 0, along = 0; // what moves the mean, and the size
      for (let c = 0; c < C; c++) {
        const error = dy[start + c] * gain[c];
        plain += error / C;
        along += (error * unit[start + c]) / C;
      }
      for (let c = 0; c < C; c++) {
        dx[start + c] = (dy[start + c] * gain[c] - plain - along * unit[start + c]) / sizes[start / C];
      }
    }
    return dx;
  }

  /* The normal distribution function, by the erfc of Numerical Recipes, good to 1.2e-7. */
  const ERFC = [-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587,
    -0.82215223, 0.17087277];
  function below(x) {
    const z = Math.abs(x) / Math.SQRT2, t = 1 / (1 + z / 2);
    const tail = (t / 2) * Math.exp(ERFC.reduceRight((total, c) => total * t + c, 0) - z * z);
    return x > 0 ? 1 - tail : tail;
  }
  const gelu = (x) => x * below(x);
  const geluSlope = (x) => below(x) + (x * Math.exp((-x * x) / 2)) / Math.sqrt(2 * Math.PI);

  /* Every head's weights a (row after row of the lower triangle), and what the heads read from the values. */
  function attend(block, x, {C, heads}) {
    const T = x.length / C, D = C / heads;
    const [q, k, v] = ["q", "k", "v"].map((name) => forwards(block[name], x));
    const out = new Float64Array(T * C), a = [];
    for (let head = 0; head < heads; head++) {
      const rows = [];
      for (let t = 0; t < T; t++) {
        const scores = new Float64Array(t + 1);
        for (let j = 0; j <= t; j++) {
          for (let c = head * D; c < (head + 1) * D; c++) scores[j] += (q[t * C + c] * k[j * C + c]) / Math.sqrt(D);
        }
        const highest = Math.max(...scores);
        const raised = scores.map((s) => Math.exp(s - highest)), total = sum(raised);
        rows.push(raised.map((e) => e / total));
        for (let j = 0; j <= t; j++) {
          for (let c = head * D; c < (head + 1) * D; c++) out[t * C + c] += rows[t][j] * v[j * C + c];
        }
      }
      a.push(rows);
    }
    return {q, k, v, a, out};
  }

  /* From the error at what the heads have read: g of every head, and the error at the block's normed input. */
  function attendBack(block, {q, k, v, a}, dOut, {C, heads}, rule) {
    const D = C / heads, [dq, dk, dv] = [q, k, v].map((x) => new Float64Array(x.length));
    const g = a.map((rows, head) => rows.map((weights, t) => {
      const errors = new Float64Array(t + 1);
      for (let j = 0; j <= t; j++) {
        for (let c = head * D; c < (head + 1) * D; c++) {
          errors[j] += dOut[t * C + c] * v[j * C + c];
          dv[j * C + c] += weights[j] * dOut[t * C + c];
        }
      }
      SOFTMAX_RULES[rule].send(weights, errors).forEach((ds, j) => {
        for (let c = head * D; c < (head + 1) * D; c++) {
          dq[t * C + c] += (ds * k[j * C + c]) / Math.sqrt(D);
          dk[j * C + c] += (ds * q[t * C + c]) / Math.sqrt(D);
        }
      });
      return errors;
    }));
    return {g, dx: add(backwards(block.q, dq), backwards(block.k, dk), backwards(block.v, dv))};
  }

  // ---- the whole ----

  /* A text of T + 1 characters, the last of them only predicted. Of every head, layer by layer: a and g = dL/da as
     rows of the lower triangle; and the loss L, the mean over the T predictions in nats. */
  function run(model, text, rule) {
    const {C, tokens, places, blocks} = model, ids = [...text].map((c) => model.ids.get(c)), T = ids.length - 1;
    let x = Float64Array.from({length: T * C}, (_, i) => tokens.values[ids[Math.floor(i / C)] * C + (i % C)] + places.values[i]);
    const kept = blocks.map((block) => {
      const norm1 = layerNorm(x, block.norm1), attention = attend(block, norm1.y, model);
      x = add(x, forwards(block.o, attention.out));
      const norm2 = layerNorm(x, block.norm2), hidden = forwards(block.up, norm2.y);
      x = add(x, forwards(block.down, hidden.map(gelu)));
      return {norm1, attention, norm2, hidden};
    });
    const norm = layerNorm(x, model.norm), error = forwards(model.head, norm.y), V = tokens.rows;
    let loss = 0;
    for (let t = 0; t < T; t++) {
      const logits = error.subarray(t * V, (t + 1) * V), highest = Math.max(...logits);
      const total = sum(logits.map((s) => Math.exp(s - highest)));
      loss += (Math.log(total) + highest - logits[ids[t + 1]]) / T;
      logits.forEach((s, i) => (logits[i] = (Math.exp(s - highest) / total - (i === ids[t + 1])) / T));
    }
    let dx = layerNormBack(norm, backwards(model.head, error));
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
