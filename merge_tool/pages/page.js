"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const page = document.getElementById("page");
  // Okabe and Ito's colours, which colour-blind readers can tell apart; and cividis, for heat.
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const COLOURS = isDark ? ["#56b4e9", "#e69f00", "#00b98a", "#cc79a7", "#d55e00", "#f0e442", "#a8a8a6"]
    : ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#767676"];
  const HEAT = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];

  // ------------------------------------------------------------------ elements: texts are texts, never markup

  function fill(element, attributes, children) {
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else if (value !== undefined) element.setAttribute(key, value);
    }
    element.append(...children.flat(Infinity).filter((child) => child !== undefined && child !== null));
    return element;
  }
  const make = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const draw = (tag, attributes, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
  const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
  const plain = (x) => (x === null || x === undefined ? "" : typeof x === "number" ? String(+x.toPrecision(4)) : x);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function heatColour(share) {
    const at = clamp(share, 0, 1) * (HEAT.length - 1), k = Math.min(HEAT.length - 2, Math.floor(at));
    const part = (text, i) => parseInt(text.slice(1 + 2 * i, 3 + 2 * i), 16);
    const mix = [0, 1, 2].map((i) => Math.round(part(HEAT[k], i) + (at - k) * (part(HEAT[k + 1], i) - part(HEAT[k], i))));
    return `rgb(${mix.join(",")})`;
  }

  function copyButton(text) {
    const button = make("button", { type: "button", onclick: async () => {
      try {
        await navigator.clipboard.writeText(text());
        button.textContent = "copied";
      } catch {
        button.textContent = "select the text and copy it";
      }
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    } }, "copy");
    return button;
  }

  function section(title, ...children) {
    const element = make("section", {}, make("h2", {}, title), ...children);
    page.append(element);
    return element;
  }

  // ------------------------------------------------------------------ tensors

  const columns = data.columns || {};
  const count = (columns.module || []).length;
  const text = (key, i) => { const place = (columns[key] || [])[i]; return place === undefined ? "" : data.texts[place]; };
  const nameOf = (i) => {
    const module = data.modules[columns.module[i]], layer = columns.layer[i];
    return layer < 0 ? module : module.replace("*", layer);
  };
  const MEASURES = {
    angle: "angle between the models (degrees)", change: "relative change |y - x| / |x|", ratio: "ratio of the norms", t: "t",
  };
  const measures = Object.keys(MEASURES).filter((key) => (columns[key] || []).some((x) => x !== null));

  function describe(i) {
    const lines = [make("b", {}, nameOf(i))];
    const figures = measures.filter((key) => columns[key][i] !== null).map((key) => `${MEASURES[key]}: ${plain(columns[key][i])}`);
    if ((columns.norm0 || [])[i] !== null && columns.norm0) figures.push(`norms: ${plain(columns.norm0[i])}, ${plain(columns.norm1[i])}`);
    lines.push(make("div", {}, figures.join("; ")));
    const rest = [text("shape", i), text("dtype", i), text("source", i), text("settings", i), text("note", i)];
    lines.push(make("div", { class: "soft" }, rest.filter((part) => part).join("; ")));
    return lines;
  }

  // ------------------------------------------------------------------ the heat map

  function heatMap() {
    const inside = [];
    for (let i = 0; i < count; i++) if (columns.layer[i] >= 0) inside.push(i);
    if (!inside.length || !measures.length) return;
    const modules = [...new Set(inside.map((i) => columns.module[i]))];
    const layers = [...new Set(inside.map((i) => columns.layer[i]))].sort((a, b) => a - b);
    const row = new Map(modules.map((m, k) => [m, k])), column = new Map(layers.map((l, k) => [l, k]));
    const cells = new Map(inside.map((i) => [row.get(columns.module[i]) * layers.length + column.get(columns.layer[i]), i]));
    const choice = make("select", { "aria-label": "what the colours show", onchange: paint },
      measures.map((key) => make("option", { value: key }, MEASURES[key])));
    const canvas = make("canvas", { tabindex: "0", role: "application", "aria-label":
      "Heat map of layers and modules. The arrow keys move from tensor to tensor; the text below says its figures." });
    const legend = make("span", { class: "soft" });
    const detail = make("div", { class: "detail", "aria-live": "polite" }, "Point at a cell, or move with the arrow keys.");
    const wide = make("div", { class: "wide" }, canvas);
    const element = section("Layers and modules", make("div", { class: "bar" }, choice, legend), wide, detail);
    let shown = -1, size = {};

    function paint() {
      const key = choice.value, values = columns[key], known = inside.map((i) => values[i]).filter((x) => x !== null);
      let low = Infinity, high = -Infinity;
      for (const x of known) { low = Math.min(low, x); high = Math.max(high, x); }
      if (key === "angle" || key === "change") low = 0;
      if (key === "t") { low = Math.min(0, low); high = Math.max(1, high); }
      const span = high - low || 1;
      legend.textContent = `dark ${plain(low)}, light ${plain(high)}; grey: none`;
      const width = Math.max(300, wide.clientWidth - 2), label = Math.min(260, Math.round(width * 0.38));
      const w = clamp((width - label - 8) / layers.length, 4, 40), h = modules.length > 90 ? 5 : 16;
      const hasSchedule = measures.includes("t"), top = hasSchedule ? 74 : 22;
      size = { label, w, h, top };
      const full = [Math.ceil(label + w * layers.length + 8), top + h * modules.length + 4], dense = window.devicePixelRatio || 1;
      canvas.width = full[0] * dense; canvas.height = full[1] * dense;
      canvas.style.width = `${full[0]}px`; canvas.style.height = `${full[1]}px`;
      const pen = canvas.getContext("2d");
      pen.scale(dense, dense);
      pen.fillStyle = css("--none");
      pen.fillRect(label, top, w * layers.length, h * modules.length);
      for (const [place, i] of cells) {
        if (values[i] === null) continue;
        pen.fillStyle = heatColour((values[i] - low) / span);
        pen.fillRect(label + (place % layers.length) * w, top + Math.floor(place / layers.length) * h, Math.ceil(w), Math.ceil(h));
      }
      pen.fillStyle = css("--soft");
      pen.font = "11px system-ui, sans-serif";
      pen.textBaseline = "middle";
      const every = Math.max(1, Math.ceil(30 / w));
      pen.textAlign = "center";
      layers.forEach((layer, k) => { if (k % every === 0) pen.fillText(layer, label + (k + 0.5) * w, top - 9); });
      pen.textAlign = "right";
      if (h >= 10) modules.forEach((m, k) => pen.fillText(shortened(pen, data.modules[m], label - 12), label - 6, top + (k + 0.5) * h));
      if (hasSchedule) schedule(pen);
      if (shown >= 0) frame(pen, shown);
    }

    function schedule(pen) {
      // the mean t of each group, layer by layer, from 0 (bottom) to 1 (top)
      const named = [...data.groups, { title: "rest", modules: modules.filter((m) => !data.groups.some((g) => g.modules.includes(m))) }];
      const { label, w } = size, low = 54, high = 6;
      pen.strokeStyle = css("--line"); pen.lineWidth = 1;
      pen.strokeRect(label, high, w * layers.length, low - high);
      named.forEach((group, k) => {
        const own = new Set(group.modules), sums = layers.map(() => [0, 0]);
        for (const i of inside) if (own.has(columns.module[i]) && columns.t[i] !== null) {
          const sum = sums[column.get(columns.layer[i])];
          sum[0] += columns.t[i]; sum[1] += 1;
        }
        pen.strokeStyle = COLOURS[k]; pen.lineWidth = 2;
        pen.beginPath();
        sums.forEach(([sum, n], at) => { if (n) pen.lineTo(label + (at + 0.5) * w, low - clamp(sum / n, 0, 1) * (low - high)); });
        pen.stroke();
        pen.fillStyle = COLOURS[k]; pen.textAlign = "right";
        pen.fillText(`t: ${group.title}`, label - 6, high + 8 + 15 * k);
      });
    }

    function frame(pen, place) {
      const { label, w, h, top } = size;
      pen.strokeStyle = "#d55e00"; pen.lineWidth = 2;
      pen.strokeRect(label + (place % layers.length) * w, top + Math.floor(place / layers.length) * h, w, h);
    }

    function show(place) {
      if (place === shown || place < 0 || place >= modules.length * layers.length) return;
      shown = place;
      paint();
      const i = cells.get(place);
      const module = data.modules[modules[Math.floor(place / layers.length)]];
      detail.replaceChildren(...(i === undefined ? [make("b", {}, `${module}: layer ${layers[place % layers.length]} has none`)] : describe(i)));
    }
    const at = (event) => {
      const box = canvas.getBoundingClientRect(), x = event.clientX - box.left - size.label, y = event.clientY - box.top - size.top;
      const k = Math.floor(x / size.w), m = Math.floor(y / size.h);
      return k >= 0 && k < layers.length && m >= 0 && m < modules.length ? m * layers.length + k : -1;
    };
    canvas.addEventListener("pointermove", (event) => show(at(event)));
    canvas.addEventListener("pointerdown", (event) => show(at(event)));
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -layers.length, ArrowDown: layers.length }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      show(shown < 0 ? 0 : clamp(shown + step, 0, modules.length * layers.length - 1));
    });
    let width = window.innerWidth;
    window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; paint(); } });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
    paint();
    return element;
  }

  function shortened(pen, name, width) {
    const inner = name.includes(".*.") ? name.slice(name.indexOf(".*.") + 3) : name;
    let kept = inner;
    while (kept.length > 4 && pen.measureText(kept).width > width) kept = "…" + kept.slice(Math.max(2, kept.length / 12 + 1));
    return kept;
  }

  // ------------------------------------------------------------------ the table of tensors

  function tensorTable() {
    if (!count) return;
    const MOST = 300, order = Array.from({ length: count }, (_, i) => i);
    const names = order.map(nameOf), heads = [["name", "name"], ...measures.map((key) => [key, MEASURES[key].replace(/ \(.*| between.*/, "")]), ["shape", "shape"], ["note", "note"]];
    let sorted = null, down = true;
    const body = make("tbody"), said = make("span", { class: "soft", "aria-live": "polite" });
    const search = make("input", { type: "search", placeholder: "part of a name", "aria-label": "part of a tensor's name", oninput: list });
    function list() {
      const wanted = search.value.toLowerCase();
      const found = order.filter((i) => names[i].toLowerCase().includes(wanted));
      if (sorted && sorted !== "name") {
        const value = (i) => (measures.includes(sorted) ? columns[sorted][i] : text(sorted, i));
        found.sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          if (x === null || y === null) return (x === null) - (y === null);
          return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
        });
      } else if (sorted) found.sort((a, b) => (names[a] < names[b] ? -1 : 1) * (down ? -1 : 1));
      said.textContent = `${found.length.toLocaleString("en")} tensors` + (found.length > MOST ? `, the first ${MOST} are shown` : "");
      body.replaceChildren(...found.slice(0, MOST).map((i) => make("tr", {}, heads.map(([key]) =>
        key === "name" ? make("td", { class: "name" }, names[i]) :
          measures.includes(key) ? make("td", { class: "number" }, plain(columns[key][i])) : make("td", {}, text(key, i))))));
    }
    const head = make("tr", {}, heads.map(([key, title]) => make("th", { scope: "col", class: measures.includes(key) ? "number" : undefined }, make("button", { type: "button", onclick: () => {
      down = sorted === key ? !down : true; sorted = key; list();
    } }, title))));
    section("Tensors", make("div", { class: "bar" }, search, said), make("div", { class: "table" }, make("table", {}, make("thead", {}, head), body)));
    list();
  }

  // ------------------------------------------------------------------ the schedule editor

  const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`);
  // A name may not look like an option, or its text would be read as one.
  const path = (word) => quoted(word.startsWith("-") ? `./${word}` : word);

  function editor() {
    if (!data.pair || !data.groups || !data.groups.length) return;
    const layers = Math.max(...columns.layer) + 1, ANCHORS = Math.min(5, layers);
    if (layers < 2) return;
    const rest = typeof data.pair.t === "number" ? clamp(data.pair.t, 0, 1) : 0.5;
    const groups = data.groups.map((group) => ({ ...group, values: firstValues(group, ANCHORS, layers, rest) }));
    const state = { rest };
    const command = make("pre", { tabindex: "0" }), yaml = make("pre", { tabindex: "0" });
    const W = 720, H = 240, left = 46, bottom = 212, top = 12, right = 700;
    const x = (k) => left + (k / (ANCHORS - 1)) * (right - left), y = (v) => bottom - v * (bottom - top);
    const beside = (g) => (g - (groups.length - 1) / 2) * 17;  // so that points of one t do not hide each other
    const chart = draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "group", "aria-label": "t over the layers, a line for each group of modules" });
    for (const v of [0, 0.25, 0.5, 0.75, 1]) chart.append(draw("line", { class: "grid", x1: left, x2: right, y1: y(v), y2: y(v) }), draw("text", { x: 4, y: y(v) + 4 }, String(v)));
    for (let k = 0; k < ANCHORS; k++) chart.append(draw("text", { x: x(k), y: H - 8, "text-anchor": k ? (k === ANCHORS - 1 ? "end" : "middle") : "start" }, `layer ${+((k / (ANCHORS - 1)) * (layers - 1)).toFixed(1)}`));
    const slider = make("input", { type: "range", min: "0", max: "1", step: "0.01", "aria-label": "t of all other tensors" });
    slider.value = String(state.rest);
    const restText = make("span", {});
    slider.addEventListener("input", () => { state.rest = +slider.value; update(); });

    groups.forEach((group, g) => {
      group.line = draw("polyline", { fill: "none", stroke: COLOURS[g], "stroke-width": "2.5" });
      chart.append(group.line);
      group.handles = group.values.map((_, k) => {
        const handle = draw("circle", { class: "handle", r: 9, fill: COLOURS[g], tabindex: "0", role: "slider", "aria-valuemin": "0", "aria-valuemax": "1", "aria-label": `t of ${group.title}, point ${k + 1} of ${ANCHORS}` });
        const set = (value) => { group.values[k] = +clamp(value, 0, 1).toFixed(2); update(); };
        handle.addEventListener("pointerdown", (event) => { handle.setPointerCapture(event.pointerId); handle.focus(); });
        handle.addEventListener("pointermove", (event) => {
          if (!handle.hasPointerCapture(event.pointerId)) return;
          const box = chart.getBoundingClientRect();
          set((bottom - ((event.clientY - box.top) * H) / box.height) / (bottom - top));
        });
        handle.addEventListener("keydown", (event) => {
          const step = { ArrowUp: 0.01, ArrowRight: 0.01, ArrowDown: -0.01, ArrowLeft: -0.01, PageUp: 0.1, PageDown: -0.1 }[event.key];
          const value = event.key === "Home" ? 0 : event.key === "End" ? 1 : step === undefined ? undefined : group.values[k] + step;
          if (value === undefined) return;
          event.preventDefault();
          set(value);
        });
        chart.append(handle);
        return handle;
      });
    });

    function update() {
      for (const [g, group] of groups.entries()) {
        group.line.setAttribute("points", group.values.map((v, k) => `${x(k) + beside(g)},${y(v)}`).join(" "));
        group.handles.forEach((handle, k) => {
          handle.setAttribute("cx", x(k) + beside(g)); handle.setAttribute("cy", y(group.values[k]));
          handle.setAttribute("aria-valuenow", group.values[k]);
        });
      }
      restText.textContent = `t = ${state.rest}`;
      const list = (values) => (values.every((v) => v === values[0]) ? [values[0]] : values);
      const words = ["slerp-merge", path(data.models[0]), path(data.models[1]), "OUT", "--t", String(state.rest)];
      for (const group of groups) words.push("--t-for", quoted(`${group.pattern}=${list(group.values).join(",")}`));
      if (data.pair.method !== "slerp") words.push("--method", data.pair.method);
      command.textContent = words.join(" ");
      const filters = groups.map((group) => {
        const values = list(group.values);
        return `    - filter: ${group.pattern}\n      value: ${values.length > 1 ? `[${values.join(", ")}]` : values[0]}\n`;
      });
      yaml.textContent = data.pair.method !== "slerp" ? "" :
        `merge_method: slerp\nbase_model: ${JSON.stringify(data.models[0])}\nmodels:\n- model: ${JSON.stringify(data.models[0])}\n- model: ${JSON.stringify(data.models[1])}\n` +
        `parameters:\n  t:\n${filters.join("")}    - value: ${state.rest}\n`;
    }
    const legend = groups.map((group, g) => {
      const mark = make("b", {}, `● ${group.title} `);
      mark.style.color = COLOURS[g];
      return make("span", {}, mark, make("span", { class: "soft" }, `(${group.pattern})`));
    });
    const element = section("Another schedule", make("p", { class: "soft" },
      "Drag the points, or move them with the arrow keys. t is how far to go from the first model (0) to the second (1)."),
    make("div", { class: "bar" }, legend), make("div", { class: "scroll" }, chart), make("div", { class: "bar" }, "all other tensors:", slider, restText),
    make("div", { class: "bar" }, "Command", copyButton(() => command.textContent)), command);
    if (data.pair.method === "slerp") element.append(make("div", { class: "bar" }, "Recipe for merge-tool run", copyButton(() => yaml.textContent)), yaml);
    element.classList.add("editor");
    update();
  }

  function firstValues(group, anchors, layers, otherwise) {
    // the merge's own t where the layers of the anchors are, the mean over the group's modules
    const own = new Set(group.modules), sums = Array.from({ length: layers }, () => [0, 0]);
    for (let i = 0; i < count; i++) if (own.has(columns.module[i]) && columns.layer[i] >= 0 && columns.t && columns.t[i] !== null) {
      sums[columns.layer[i]][0] += columns.t[i]; sums[columns.layer[i]][1] += 1;
    }
    return Array.from({ length: anchors }, (_, k) => {
      const [sum, n] = sums[Math.round((k / (anchors - 1)) * (layers - 1))];
      return n ? +clamp(sum / n, 0, 1).toFixed(2) : otherwise;
    });
  }

  // ------------------------------------------------------------------ a sweep

  function sweep() {
    const lines = new Map();
    data.points.forEach((point) => lines.set(point.line, [...(lines.get(point.line) || []), point]));
    const xs = data.numeric ? data.points.map((p) => p.x) : [...new Set(data.points.map((p) => String(p.x)))];
    const low = data.numeric ? Math.min(...xs) : 0, high = data.numeric ? Math.max(...xs) : xs.length - 1;
    const share = (p) => ((data.numeric ? p.x : xs.indexOf(String(p.x))) - low) / (high - low || 1);
    const detail = make("div", { class: "detail", "aria-live": "polite" }, "Point at a merge, or reach it with Tab.");
    const markers = [];
    const said = (p) => `${p.words.join(", ")}: ${data.scores.map((name, s) => `${name} ${plain(p.scores[s])}`).join(", ")}`;
    const how = (p) => (data.keys.length === 1 && data.keys[0] === "t" && data.models.length === 2 ?
      `slerp-merge ${path(data.models[0])} ${path(data.models[1])} OUT --t ${p.x}` : `merge-tool run RECIPE.yaml OUT ${p.words.map((w) => `--set ${quoted(w)}`).join(" ")}`);
    const panels = data.scores.map((name, s) => panel(`${name} (${data.less.includes(name) ? "less" : "more"} is better)`, data.keys[0],
      share, (p) => p.scores[s], [data.numeric ? plain(low) : xs[0], data.numeric ? plain(high) : xs[xs.length - 1]]));
    if (data.scores.length >= 2) {
      const first = data.points.map((p) => p.scores[0]), a = Math.min(...first), b = Math.max(...first);
      panels.push(panel(`${data.scores[1]} over ${data.scores[0]}`, data.scores[0], (p) => (p.scores[0] - a) / (b - a || 1), (p) => p.scores[1], [plain(a), plain(b)], true));
    }
    function panel(title, label, xShare, value, ends, isFront) {
      const W = 360, H = 240, left = 60, bottom = 200, top = 14, right = 348, all = data.points.map(value);
      const least = Math.min(...all), most = Math.max(...all), y = (v) => bottom - ((v - least) / (most - least || 1)) * (bottom - top);
      const x = (p) => left + xShare(p) * (right - left);
      const chart = draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "group", "aria-label": title });
      for (const v of [least, (least + most) / 2, most]) chart.append(draw("line", { class: "grid", x1: left, x2: right, y1: y(v), y2: y(v) }), draw("text", { x: left - 10, y: y(v) + 4, "text-anchor": "end" }, plain(v)));
      chart.append(draw("text", { x: left, y: H - 22, "text-anchor": "start" }, ends[0]), draw("text", { x: right, y: H - 22, "text-anchor": "end" }, ends[1]), draw("text", { x: (left + right) / 2, y: H - 6, "text-anchor": "middle" }, label));
      [...lines.values()].forEach((points, k) => {
        const colour = COLOURS[k % COLOURS.length];
        chart.append(draw("polyline", { fill: "none", stroke: colour, "stroke-width": "1.8", points: points.map((p) => `${x(p)},${y(value(p))}`).join(" ") }));
        points.forEach((p) => {
          const dot = draw("circle", { r: 5.5, cx: x(p), cy: y(value(p)), fill: p.pareto ? colour : css("--back"), stroke: colour, "stroke-width": "2", tabindex: "0", role: "img", "aria-label": said(p) });
          for (const kind of ["pointerenter", "focus"]) dot.addEventListener(kind, () => detail.replaceChildren(make("b", {}, said(p)), make("div", {}, how(p)), make("div", { class: "soft" }, p.pareto ? "Pareto-optimal: no other merge is as good in every score and better in one" : "another merge is as good in every score, and better in one")));
          chart.append(dot);
        });
      });
      if (!isFront && data.numeric && lines.size === 1) {
        const rule = draw("line", { x1: left, x2: left, y1: top, y2: bottom, stroke: COLOURS[1], "stroke-dasharray": "4 3" });
        chart.append(rule);
        markers.push((at) => { const place = left + ((at - low) / (high - low || 1)) * (right - left); rule.setAttribute("x1", place); rule.setAttribute("x2", place); });
      }
      return make("div", { class: "panel" }, make("div", {}, title), chart);
    }
    const element = section("Scores", make("p", { class: "soft" }, "Filled: Pareto-optimal."));
    if (lines.size > 1) element.append(make("div", { class: "bar" }, [...lines.keys()].map((line, k) => {
      const mark = make("span", {}, `● ${line}`);
      mark.style.color = COLOURS[k % COLOURS.length];
      return mark;
    })));
    if (data.numeric && lines.size === 1 && data.points.length > 1) {
      const slider = make("input", { type: "range", min: low, max: high, step: (high - low) / 100 || 1, "aria-label": data.keys[0] });
      const result = make("span", { "aria-live": "polite" });
      const move = () => {
        const at = +slider.value, points = data.points, k = clamp(points.findIndex((p) => p.x >= at), 1, points.length - 1);
        const [a, b] = [points[k - 1], points[k]], part = clamp((at - a.x) / (b.x - a.x || 1), 0, 1);
        result.textContent = `${data.keys[0]} = ${plain(at)}, between the merges that were scored: ` + data.scores.map((name, s) => `${name} about ${plain(a.scores[s] + part * (b.scores[s] - a.scores[s]))}`).join(", ");
        markers.forEach((marker) => marker(at));
      };
      slider.addEventListener("input", move);
      slider.value = String((low + high) / 2);
      element.append(make("div", { class: "bar" }, slider, result));
      element.append(make("div", { class: "panels" }, panels), detail);
      move();
    } else element.append(make("div", { class: "panels" }, panels), detail);
    const heads = [...data.keys, ...data.scores, "Pareto-optimal"];
    section("All merges", make("div", { class: "table" }, make("table", {}, make("thead", {}, make("tr", {}, heads.map((name) => make("th", { scope: "col", class: data.scores.includes(name) ? "number" : undefined }, name)))),
      make("tbody", {}, data.points.map((p) => make("tr", {}, p.words.map((word) => make("td", {}, word.slice(word.indexOf("=") + 1))), p.scores.map((s) => make("td", { class: "number" }, plain(s))), make("td", {}, p.pareto ? "yes" : "")))))));
  }

  // ------------------------------------------------------------------ the page

  page.append(make("h1", {}, data.title), make("p", { class: "soft" }, data.models.join(" + ")));
  if (data.facts) page.append(make("dl", {}, data.facts.map(([key, value]) => [make("dt", {}, key), make("dd", {}, value)])));
  for (const warning of data.warnings || []) page.append(make("p", { class: "warning" }, warning));
  if (data.kind === "sweep") sweep();
  else {
    heatMap();
    editor();
    tensorTable();
    if (data.recipe) section("Recipe", make("div", { class: "bar" }, copyButton(() => data.recipe)), make("pre", { tabindex: "0" }, data.recipe));
    if (data.files) section("Files", make("div", { class: "table" }, make("table", {}, make("thead", {}, make("tr", {}, ["name", "bytes", "SHA-256"].map((name) => make("th", { scope: "col" }, name)))),
      make("tbody", {}, data.files.map(([name, size, digest]) => make("tr", {}, make("td", { class: "name" }, name), make("td", { class: "number" }, size.toLocaleString("en")), make("td", { class: "name" }, digest)))))));
  }
})();
