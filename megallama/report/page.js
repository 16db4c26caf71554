"use strict";
// Draws the plots of a report. The data is what page.py writes: runs with their curves and marks, and the plots.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const MARGIN = { left: 64, right: 12, top: 8, bottom: 24 };
  const HEIGHT = 240, NEAR = 8, COLOURS = 8;
  const view = { axis: "steps", range: null, hidden: new Set() }; // range: [from, to] of the axis, or null for all
  const tip = document.getElementById("tip"), reset = document.getElementById("reset");

  function element(name, attributes, parent) {
    const svg = ["svg", "path", "line", "rect", "circle", "text", "g", "defs", "clipPath"].includes(name);
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "text") made.textContent = value; // never as HTML: names are whatever a folder is called
      else made.setAttribute(key, value);
    }
    parent?.append(made);
    return made;
  }

  // What can be seen.

  const several = data.runs.length > 1;
  const curves = data.runs.flatMap((run, at) => run.curves.map((curve) => ({ ...curve, run: run.name, at })));
  for (const plot of data.plots) {
    const drawn = curves.filter((curve) => curve.plot === plot.key), names = [...new Set(drawn.map((curve) => curve.name))];
    drawn.forEach((curve, order) => {
      const within = names.indexOf(curve.name), round = Math.floor(within / COLOURS);
      curve.id = `${plot.key}/${order}`;
      curve.label = several ? `${curve.run}: ${curve.name}` : curve.name;
      if (several && !plot.parts) { // a run has one colour in all of these
        curve.colour = curve.at % COLOURS;
        curve.dash = within % 4;
      } else {
        curve.colour = within % COLOURS;
        curve.dash = (several ? curve.at + 2 * round : round) % 4;
      }
      curve.classes = `curve c${curve.colour} d${curve.dash} ${curve.style}`;
    });
  }
  const marks = data.runs.flatMap((run, at) => run.marks.map((mark) => ({ ...mark, run: run.name, at })));
  const kinds = Object.keys(data.marks).filter((kind) => marks.some((mark) => mark.kind === kind));

  function wholeRange() {
    let from = Infinity, to = -Infinity;
    for (const xs of [...curves.map((curve) => curve[view.axis]), marks.map((mark) => mark[view.axis])]) {
      for (const x of xs) { from = Math.min(from, x); to = Math.max(to, x); }
    }
    return from < to ? [from, to] : [from - 0.5, to + 0.5];
  }

  // Scales and numbers.

  function scale([from, to], [start, end], logarithmic) {
    const f = logarithmic ? Math.log10 : (v) => v;
    const slope = (end - start) / (f(to) - f(from));
    const place = (v) => start + (f(v) - f(from)) * slope;
    place.back = (pixel) => { const v = f(from) + (pixel - start) / slope; return logarithmic ? 10 ** v : v; };
    return place;
  }

  function ticks([from, to], most, logarithmic) {
    if (logarithmic && to / from > 4) {
      const found = [];
      for (const factors of [[1, 2, 5], [1]]) {
        found.length = 0;
        for (let power = Math.floor(Math.log10(from)); power <= Math.log10(to); power++) {
          found.push(...factors.map((factor) => factor * 10 ** power).filter((v) => v >= from && v <= to));
        }
        if (found.length <= most) break;
      }
      const every = Math.ceil(found.length / most);
      return found.filter((_, at) => at % every === 0);
    }
    const rough = (to - from) / most, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((v) => v >= rough);
    const first = Math.ceil(from / step), count = Math.floor(to / step) - first + 1;
    return Array.from({ length: Math.max(0, count) }, (_, at) => (first + at) * step);
  }

  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 3 });
  function short(value) {
    const rounded = Number(value.toPrecision(6)), size = Math.abs(rounded);
    if (size !== 0 && size < 1e-3) return rounded.toExponential();
    return size >= 1e4 ? compact.format(rounded) : String(rounded);
  }
  const inFull = (value) => (Math.abs(value) >= 1e-4 ? value.toLocaleString("en", { maximumSignificantDigits: 7 }) : String(value));

  function heightRange(shown, [from, to], logarithmic) {
    let least = Infinity, most = -Infinity;
    for (const curve of shown) {
      const xs = curve[view.axis];
      curve.values.forEach((value, at) => {
        // A dashed line is a level that holds between its points.
        if (value !== null && (curve.style === "dashed" || (xs[at] >= from && xs[at] <= to))) {
          least = Math.min(least, value); most = Math.max(most, value);
        }
      });
    }
    if (least > most) return logarithmic ? [1, 10] : [0, 1];
    if (logarithmic) { const pad = Math.max((most / least) ** 0.04, 1.02); return [least / pad, most * pad]; }
    const pad = (most - least) * 0.04 || Math.abs(most) * 0.04 || 1;
    return [least - pad, most + pad];
  }

  // Drawing.

  function path(curve, x, y, logarithmic) {
    let drawn = "", pen = false;
    const xs = curve[view.axis];
    curve.values.forEach((value, at) => {
      const there = value !== null && !(logarithmic && value <= 0);
      if (there) {
        const point = `${x(xs[at]).toFixed(1)},${y(value).toFixed(1)}`;
        drawn += pen ? `L${point}` : `M${point}h0`; // h0: a point between two gaps shows as a dot
      }
      pen = there;
    });
    return drawn;
  }

  function frame(figure, height) {
    figure.querySelector(":scope > svg")?.remove();
    const width = Math.max(240, figure.clientWidth - 20);
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": figure.dataset.title });
    figure.querySelector("figcaption").after(svg);
    const inside = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom };
    const clip = `clip-${figure.dataset.key}`;
    element("rect", { x: inside.left, y: inside.top - 2, width: inside.right - inside.left, height: inside.bottom - inside.top + 4 },
      element("clipPath", { id: clip }, element("defs", {}, svg)));
    const range = view.range ?? wholeRange();
    const x = scale(range, [inside.left + 4, inside.right - 4]);
    for (const value of ticks(range, Math.floor(width / 110))) {
      element("line", { class: "grid", x1: x(value), x2: x(value), y1: inside.top, y2: inside.bottom }, svg);
      element("text", { x: x(value), y: height - 8, "text-anchor": "middle", text: short(value) }, svg);
    }
    return { svg, inside, range, x, layer: element("g", { "clip-path": `url(#${clip})` }, svg) };
  }

  function drawPlot(figure, plot) {
    const { svg, inside, range, x, layer } = frame(figure, HEIGHT);
    const all = curves.filter((curve) => curve.plot === plot.key);
    const shown = all.filter((curve) => !view.hidden.has(curve.id));
    const logarithmic = plot.logarithmic && all.some((curve) => curve.values.some((v) => v > 0))
      && !all.some((curve) => curve.values.some((v) => v !== null && v <= 0));
    const heights = heightRange(shown, range, logarithmic);
    const y = scale(heights, [inside.bottom, inside.top], logarithmic);
    for (const value of ticks(heights, 6, logarithmic)) {
      svg.insertBefore(element("line", { class: "grid", x1: inside.left, x2: inside.right, y1: y(value), y2: y(value) }), layer);
      element("text", { x: inside.left - 6, y: y(value) + 4, "text-anchor": "end", text: short(value) }, svg);
    }
    for (const mark of marks.filter((m) => data.returned.includes(m.kind))) {
      element("line", { class: "return", x1: x(mark[view.axis]), x2: x(mark[view.axis]), y1: inside.top, y2: inside.bottom }, layer);
    }
    for (const curve of shown) {
      element("path", { class: curve.classes, "data-run": curve.run, "data-name": curve.name, d: path(curve, x, y, logarithmic) }, layer);
      if (curve.style === "points") {
        curve.values.forEach((value, at) => {
          if (value !== null) element("circle", { class: `point c${curve.colour}`, r: 2.5, cx: x(curve[view.axis][at]), cy: y(value) }, layer);
        });
      }
    }
    follow(svg, inside, x, (pixel, cross) => {
      const points = pointsNear(shown, x.back(pixel));
      for (const { curve, at } of points) {
        element("circle", { class: `point c${curve.colour}`, r: 4, cx: x(curve[view.axis][at]), cy: y(curve.values[at]) }, cross);
      }
      return points.map(({ curve, at }) => [curve.label, `${inFull(curve.values[at])}${plot.unit ? ` ${plot.unit}` : ""}`, where(curve, at)]);
    });
  }

  const where = (thing, at) => `step ${thing.steps[at].toLocaleString("en")}${view.axis === "steps" ? "" : `, ${inFull(thing[view.axis][at])} ${view.axis}`}`;

  function pointsNear(shown, x) {
    return shown.flatMap((curve) => {
      let best = -1, distance = Infinity;
      curve[view.axis].forEach((each, at) => {
        if (curve.values[at] !== null && Math.abs(each - x) < distance) { best = at; distance = Math.abs(each - x); }
      });
      return best < 0 ? [] : [{ curve, at: best }];
    });
  }

  const SHAPES = {
    resume: "M-4-5L5 0L-4 5Z", rollback: "M4-5L-5 0L4 5Z", rewind: "M0-5L-5 0L0 5ZM5-5L0 0L5 5Z",
    skip: "M-4-4L4 4M-4 4L4-4", straggler: "M-4-5H4L0 0L4 5H-4L0 0Z", checkpoint: "M0-5V5", checkpoint_failed: "M-5 0H5M0-5V5",
  };
  const MARK_COLOURS = { resume: 0, rollback: 3, rewind: 7, skip: 1, straggler: 5, checkpoint: 2, checkpoint_failed: 4 };

  function drawHistory(figure) {
    const { svg, inside, x, layer } = frame(figure, HEIGHT);
    const lane = (kind) => inside.top + (inside.bottom - inside.top) * (kinds.indexOf(kind) + 0.5) / kinds.length;
    for (const mark of marks) {
      const colour = several ? mark.at % COLOURS : MARK_COLOURS[mark.kind];
      element("path", {
        class: `mark c${colour}${mark.stands ? "" : " undone"}`, "data-run": mark.run, "data-kind": mark.kind,
        d: SHAPES[mark.kind], transform: `translate(${x(mark[view.axis]).toFixed(1)},${lane(mark.kind)})`,
      }, layer);
    }
    follow(svg, inside, x, (pixel) => marks.filter((mark) => Math.abs(x(mark[view.axis]) - pixel) <= NEAR)
      .slice(0, 20).map((mark) => [several ? mark.run : "", mark.text, view.axis === "steps" ? "" : `${inFull(mark[view.axis])} ${view.axis}`]));
  }

  // The pointer: what it is over, and what it drags across.

  function follow(svg, inside, x, rowsAt) {
    const cross = element("g", {}, svg);
    const area = element("rect", { x: inside.left, y: inside.top, width: inside.right - inside.left, height: inside.bottom - inside.top, fill: "transparent" }, svg);
    let from = null;
    const pixel = (event) => Math.min(inside.right, Math.max(inside.left, event.clientX - svg.getBoundingClientRect().left));
    area.addEventListener("pointerdown", (event) => { from = pixel(event); area.setPointerCapture(event.pointerId); });
    area.addEventListener("pointermove", (event) => {
      const here = pixel(event);
      cross.replaceChildren();
      element("line", { class: "cross", x1: here, x2: here, y1: inside.top, y2: inside.bottom }, cross);
      if (from !== null) {
        element("rect", { class: "chosen", x: Math.min(from, here), width: Math.abs(here - from), y: inside.top, height: inside.bottom - inside.top }, cross);
      }
      showTip(event, rowsAt(here, cross));
    });
    area.addEventListener("pointerup", (event) => {
      const to = pixel(event), start = from;
      from = null;
      if (start !== null && Math.abs(to - start) > 5) show({ range: [x.back(Math.min(start, to)), x.back(Math.max(start, to))] });
    });
    area.addEventListener("pointercancel", () => { from = null; });
    area.addEventListener("pointerleave", () => { cross.replaceChildren(); tip.hidden = true; });
    area.addEventListener("dblclick", () => show({ range: null }));
  }

  function showTip(event, rows) {
    tip.replaceChildren();
    tip.hidden = rows.length === 0;
    const table = element("table", {}, tip);
    for (const cells of rows) {
      const row = element("tr", {}, table);
      for (const text of cells) element("td", { text }, row);
    }
    const right = event.clientX + 16 + tip.offsetWidth > innerWidth;
    tip.style.left = `${Math.max(4, right ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16)}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 4))}px`;
  }

  // The page.

  const figures = [];

  function addFigure(key, title, unit, draw) {
    const figure = element("figure", { "data-key": key, "data-title": title }, document.getElementById("plots"));
    const caption = element("figcaption", { text: title }, figure);
    if (unit) element("small", { text: ` ${unit}` }, caption);
    figures.push(() => draw(figure));
    return figure;
  }

  function addNames(figure, plot) {
    const names = element("div", { class: "names" }, figure);
    for (const curve of curves.filter((each) => each.plot === plot.key)) {
      const button = element("button", { type: "button", "aria-pressed": "true" }, names);
      element("path", { class: curve.classes, d: "M2 5H22" }, element("svg", { viewBox: "0 0 24 10", height: 10, "aria-hidden": "true" }, button));
      element("span", { text: curve.label }, button);
      button.addEventListener("click", () => {
        if (!view.hidden.delete(curve.id)) view.hidden.add(curve.id);
        button.setAttribute("aria-pressed", String(!view.hidden.has(curve.id)));
        show({});
      });
    }
  }

  function addKinds(figure) {
    const names = element("div", { class: "names" }, figure);
    for (const kind of kinds) {
      const entry = element("span", { class: "kind" }, names);
      const picture = element("svg", { viewBox: "-8 -6 16 12", height: 12, "aria-hidden": "true" }, entry);
      element("path", { class: `mark c${several ? 0 : MARK_COLOURS[kind]}`, d: SHAPES[kind] }, picture);
      element("span", { text: `${data.marks[kind]} (${marks.filter((mark) => mark.kind === kind).length})` }, entry);
    }
  }

  function show(change) {
    Object.assign(view, change);
    reset.disabled = view.range === null;
    for (const draw of figures) draw();
  }

  for (const plot of data.plots.filter((each) => curves.some((curve) => curve.plot === each.key))) {
    addNames(addFigure(plot.key, plot.title, plot.unit, (figure) => drawPlot(figure, plot)), plot);
  }
  if (kinds.length) {
    addKinds(addFigure("history", "What happened", "", drawHistory));
  }
  for (const button of document.querySelectorAll("input[name=axis]")) {
    button.checked = button.value === view.axis; // a browser may restore another choice
    button.addEventListener("change", () => show({ axis: button.value, range: null }));
  }
  reset.addEventListener("click", () => show({ range: null }));
  addEventListener("keydown", (event) => { if (event.key === "Escape") show({ range: null }); });
  new ResizeObserver(() => show({})).observe(document.getElementById("plots"));
  show({});
})();
