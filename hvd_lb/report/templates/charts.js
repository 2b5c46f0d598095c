"use strict";
// Charts of a page: lines, bands and error bars over one axis. Drag to zoom, + − 0 and arrows on the keyboard, two
// fingers on a phone; charts over the same axis are zoomed together. Values are shown under the pointer.
(() => {
  const charts = JSON.parse(document.getElementById("data")?.textContent ?? "[]");
  const place = document.getElementById("charts");
  const SVG = "http://www.w3.org/2000/svg", PALETTE = 8, TOP = 8, BOTTOM = 34, RIGHT = 10;
  const zooms = {}, all = [];  // by the axis: [from, to], or nothing
  const STORE = "hvd-lb " + location.pathname;

  const make = (tag, attributes = {}, parent = null) => {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    parent?.append(node);
    return node;
  };
  const element = (tag, parent, text = "", name = "") => {
    const node = document.createElement(tag);
    if (text) node.textContent = text;
    if (name) node.className = name;
    parent.append(node);
    return node;
  };
  const number = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size >= 1e10) return Number(value.toPrecision(4)).toExponential();
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    return String(Number(value.toPrecision(size >= 100 ? 5 : 4)));
  };
  const colour = (index) => `var(--c${index % PALETTE})`;

  const ticks = (low, high, most) => {
    const raw = (high - low) / Math.max(1, most), power = 10 ** Math.floor(Math.log10(raw || 1));
    const step = [1, 2, 5, 10].map((of) => of * power).find((of) => of >= raw) ?? power;
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(at * step);
    return found;
  };

  class Chart {
    constructor(spec) {
      this.spec = spec;
      this.hidden = new Set();
      this.to = spec.log_x ? Math.log2 : (x) => x;
      this.back = spec.log_x ? (x) => 2 ** x : (x) => x;
      this.figure = element("figure", place);
      const caption = element("figcaption", this.figure);
      element("b", caption, spec.title);
      spec.series.forEach((series, index) => {
        series.paint = colour(series.colour ?? index);
        if (!series.x.length) return;
        const key = element("button", caption, "", "key");
        key.type = "button";
        key.setAttribute("aria-pressed", "true");
        const line = element("i", key, "", series.dashed ? "dashed" : "");
        line.style.borderTopColor = series.paint;
        element("span", key, series.name);
        key.onclick = () => {
          this.hidden.has(index) ? this.hidden.delete(index) : this.hidden.add(index);
          key.setAttribute("aria-pressed", String(!this.hidden.has(index)));
          this.draw();
        };
      });
      const zoom = element("span", caption, "", "zoom");
      for (const [text, title, act] of [["−", "zoom out", () => this.scale(2)], ["+", "zoom in", () => this.scale(.5)],
        ["all", "show all", () => this.set(null)]]) {
        const button = element("button", zoom, text);
        button.type = "button";
        button.title = title;
        button.onclick = act;
      }
      this.svg = make("svg", { tabindex: 0, role: "img", "aria-label": `${spec.title} over ${spec.x_label}` });
      this.figure.append(this.svg);
      this.tip = element("div", this.figure, "", "tip");
      this.tip.hidden = true;
      this.listen();
    }

    extent() {
      const same = all.filter((other) => other.spec.x_label === this.spec.x_label);
      const xs = same.flatMap((other) => other.spec.series.flatMap((series) => series.x)).map(this.to);
      const low = xs.reduce((a, b) => Math.min(a, b), Infinity), high = xs.reduce((a, b) => Math.max(a, b), -Infinity);
      if (!(low <= high)) return [0, 1];
      if (this.spec.log_x || high <= 0) return [low - .5, high + .5];
      return [Math.min(0, low), high];
    }

    view() { return zooms[this.spec.x_label] ?? this.extent(); }

    set(view) {
      if (view) {
        const [low, high] = this.extent(), least = (high - low) / 1e4;
        view = [Math.max(low, view[0]), Math.min(high, view[1])];
        if (view[1] - view[0] < least) return;
        if (view[0] <= low && view[1] >= high) view = null;
      }
      view ? zooms[this.spec.x_label] = view : delete zooms[this.spec.x_label];
      try { sessionStorage.setItem(STORE, JSON.stringify(zooms)); } catch { /* a page from a file may not */ }
      all.filter((other) => other.spec.x_label === this.spec.x_label).forEach((other) => other.draw());
    }

    scale(by, at = null) {
      const [from, to] = this.view(), middle = at ?? (from + to) / 2;
      this.set([middle - (middle - from) * by, middle + (to - middle) * by]);
    }

    draw() {
      const spec = this.spec, width = Math.max(260, this.svg.clientWidth || place.clientWidth);
      const height = width < 560 ? 220 : 280, [from, to] = this.view();
      const shown = spec.series.filter((series, i) => series.x.length && !this.hidden.has(i));
      let low = Infinity, high = -Infinity;
      for (const series of shown) {
        series.x.forEach((x, i) => {
          const at = this.to(x);
          if (at < from || at > to || series.y[i] === null) return;
          low = Math.min(low, series.y[i], spec.cut_bands ? Infinity : series.low?.[i] ?? Infinity);
          high = Math.max(high, series.y[i], spec.cut_bands ? -Infinity : series.high?.[i] ?? -Infinity);
        });
      }
      if (!(low <= high)) [low, high] = [0, 1];
      if (low >= 0 && low < high / 2) low = 0;
      // Numbers that differ in their last digits alone are a flat line: no axis has ticks between them.
      const room = Math.max(high - low, Math.max(Math.abs(low), Math.abs(high)) * 1e-6 || 1) * .06;
      high += room;
      if (low !== 0) low -= room;
      const marks = ticks(low, high, height / 50), left = 14 + 7 * Math.max(...marks.map((of) => number(of).length), 2);
      const inner = width - left - RIGHT, tall = height - TOP - BOTTOM;
      this.px = (at) => left + (at - from) / (to - from) * inner;
      this.at = (px) => from + (px - left) / inner * (to - from);
      const py = (value) => TOP + (high - value) / (high - low) * tall;
      const root = this.svg;
      root.replaceChildren();
      root.setAttribute("viewBox", `0 0 ${width} ${height}`);
      root.style.height = `${height}px`;
      const clip = `clip-${spec.key}`, defs = make("defs", {}, root);
      make("rect", { x: left, y: TOP - 2, width: inner, height: tall + 4 }, make("clipPath", { id: clip }, defs));
      for (const value of marks) {
        make("line", { x1: left, x2: width - RIGHT, y1: py(value), y2: py(value), class: "grid" }, root);
        make("text", { x: left - 6, y: py(value) + 4, "text-anchor": "end" }, root).textContent = number(value);
      }
      const across = spec.log_x
        ? [...new Set(shown.flatMap((series) => series.x))].map(this.to).filter((at) => at >= from && at <= to)
        : ticks(from, to, inner / 80);
      let free = -Infinity;
      for (const at of across.sort((a, b) => a - b)) {
        const text = number(this.back(at)), half = 4 * text.length;
        make("line", { x1: this.px(at), x2: this.px(at), y1: TOP, y2: TOP + tall, class: "grid" }, root);
        if (this.px(at) - half < free) continue;
        free = this.px(at) + half;
        make("text", { x: this.px(at), y: height - 18, "text-anchor": "middle" }, root).textContent = text;
      }
      make("text", { x: left + inner / 2, y: height - 3, "text-anchor": "middle" }, root).textContent =
        `${spec.x_label} — ${spec.y_label}`;
      const plot = make("g", { "clip-path": `url(#${clip})` }, root);
      for (const mark of spec.marks) {
        const x = this.px(this.to(mark.x));
        make("line", { x1: x, x2: x, y1: TOP, y2: TOP + tall, class: "mark" }, plot);
      }
      for (const series of shown) this.line(plot, series, py);
      this.cross = make("line", { y1: TOP, y2: TOP + tall, class: "cross", visibility: "hidden" }, root);
      this.box = make("rect", { y: TOP, height: tall, class: "select", visibility: "hidden" }, root);
    }

    line(plot, series, py) {
      const x = series.x.map((value) => this.px(this.to(value)));
      const whole = series.y.map((value, i) => value !== null);
      if (series.low && !series.bars) {
        const edge = x.map((at, i) => `${at.toFixed(1)},${py(series.high[i]).toFixed(1)}`)
          .concat(x.map((at, i) => `${at.toFixed(1)},${py(series.low[i]).toFixed(1)}`).reverse());
        make("polygon", { points: edge.join(" "), style: `fill:${series.paint};opacity:.18` }, plot);
      }
      if (series.low && series.bars) {
        x.forEach((at, i) => {
          if (!whole[i]) return;
          const [top, bottom] = [py(series.high[i]), py(series.low[i])];
          const path = `M${at - 4},${top}h8m-4,0V${bottom}m-4,0h8`;
          make("path", { d: path, style: `fill:none;stroke:${series.paint};stroke-width:1.5` }, plot);
        });
      }
      let path = "", pen = "M";
      x.forEach((at, i) => {
        if (!whole[i]) { pen = "M"; return; }
        path += `${pen}${at.toFixed(1)},${py(series.y[i]).toFixed(1)}`;
        pen = "L";
      });
      const dash = series.dashed ? ";stroke-dasharray:6 4" : "";
      make("path", { d: path, style: `fill:none;stroke:${series.paint};stroke-width:1.8;stroke-linejoin:round${dash}` }, plot);
      const alone = (i) => whole[i] && !whole[i - 1] && !whole[i + 1];  // of which there is no line
      if (x.length <= 60 || whole.some((_, i) => alone(i))) {
        x.forEach((at, i) => (x.length <= 60 ? whole[i] : alone(i)) && make("circle", { cx: at, cy: py(series.y[i]), r: 2.6, style: `fill:${series.paint}` }, plot));
      }
    }

    show(px) {
      const at = this.at(px), shown = this.spec.series.filter((series, i) => series.x.length && !this.hidden.has(i));
      let best = null;
      for (const series of shown) {
        for (const x of series.x) {
          if (best === null || Math.abs(this.to(x) - at) < Math.abs(best - at)) best = this.to(x);
        }
      }
      if (best === null) return;
      const near = 6 / (this.px(1) - this.px(0)), [from, to] = this.view(), margin = (to - from) / 50;
      this.tip.replaceChildren();
      element("b", this.tip, `${this.spec.x_label} ${number(this.back(best))}`);
      const table = element("table", this.tip);
      for (const series of shown) {
        if (best < this.to(series.x[0]) - margin || best > this.to(series.x.at(-1)) + margin) continue;
        let nearest = 0;
        series.x.forEach((x, i) => {
          if (Math.abs(this.to(x) - best) < Math.abs(this.to(series.x[nearest]) - best)) nearest = i;
        });
        const row = element("tr", table), sign = element("td", row, "■ " + series.name);
        sign.style.color = series.paint;
        let text = number(series.y[nearest]);
        if (series.low && series.y[nearest] !== null) text += ` (${number(series.low[nearest])} … ${number(series.high[nearest])})`;
        element("td", row, text, "number");
      }
      for (const mark of this.spec.marks) if (Math.abs(this.to(mark.x) - at) < near) element("p", this.tip, mark.text);
      this.tip.hidden = false;
      const x = this.px(best), width = this.figure.clientWidth;
      this.cross.setAttribute("x1", x);
      this.cross.setAttribute("x2", x);
      this.cross.setAttribute("visibility", "visible");
      const tip = this.tip.offsetWidth;
      this.tip.style.left = `${Math.max(0, Math.min(x + 14 + tip > width ? x - tip - 14 : x + 14, width - tip))}px`;
      this.tip.style.top = `${this.svg.getBoundingClientRect().top - this.figure.getBoundingClientRect().top + 10}px`;
    }

    hide() {
      this.tip.hidden = true;
      this.cross?.setAttribute("visibility", "hidden");
    }

    listen() {
      const svg = this.svg, fingers = new Map();
      let start = null, spread = 0;
      const px = (event) => event.clientX - svg.getBoundingClientRect().left;
      svg.addEventListener("pointerdown", (event) => {
        fingers.set(event.pointerId, px(event));
        if (event.pointerType === "mouse") {
          start = px(event);
          svg.setPointerCapture(event.pointerId);
        }
        if (fingers.size === 2) spread = Math.abs([...fingers.values()][0] - [...fingers.values()][1]);
      });
      svg.addEventListener("pointermove", (event) => {
        const x = px(event);
        if (fingers.has(event.pointerId)) fingers.set(event.pointerId, x);
        if (fingers.size === 2) {
          const [a, b] = fingers.values(), now = Math.abs(a - b);
          if (spread > 10 && now > 10) this.scale(spread / now, this.at((a + b) / 2));
          spread = now;
          return;
        }
        if (start !== null) {
          this.box.setAttribute("x", Math.min(start, x));
          this.box.setAttribute("width", Math.abs(x - start));
          this.box.setAttribute("visibility", "visible");
        }
        this.show(x);
      });
      const end = (event) => {
        fingers.delete(event.pointerId);
        if (start === null) return;
        const from = start, to = px(event);
        start = null;
        this.box.setAttribute("visibility", "hidden");
        if (event.type === "pointerup" && Math.abs(to - from) > 8) this.set([this.at(Math.min(from, to)), this.at(Math.max(from, to))]);
      };
      svg.addEventListener("pointerup", end);
      svg.addEventListener("pointercancel", end);
      svg.addEventListener("pointerleave", () => start === null && this.hide());
      svg.addEventListener("dblclick", () => this.set(null));
      svg.addEventListener("wheel", (event) => {
        if (!event.ctrlKey && !event.metaKey) return;  // else the page scrolls
        event.preventDefault();
        this.scale(event.deltaY > 0 ? 1.25 : .8, this.at(px(event)));
      }, { passive: false });
      svg.addEventListener("keydown", (event) => {
        const [from, to] = this.view(), part = (to - from) / 5;
        const acts = {
          "+": () => this.scale(.5), "=": () => this.scale(.5), "-": () => this.scale(2), 0: () => this.set(null),
          ArrowLeft: () => this.set([from - part, to - part]), ArrowRight: () => this.set([from + part, to + part]),
        };
        if (acts[event.key]) { event.preventDefault(); acts[event.key](); }
      });
    }
  }

  try { Object.assign(zooms, JSON.parse(sessionStorage.getItem(STORE) ?? "{}")); } catch { /* as above */ }
  for (const spec of charts) all.push(new Chart(spec));
  const draw = () => all.forEach((chart) => chart.draw());
  draw();
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
  if (REFRESH_SECONDS) setTimeout(() => location.reload(), 1000 * REFRESH_SECONDS);
})();
