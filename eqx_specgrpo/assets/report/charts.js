// One chart: its lines, bands or stacked bars over the steps, read with the pointer, a finger or the arrow keys.

const HEIGHT = 190;
const ROOM = { top: 10, right: 14, bottom: 34 };
const DOTS_UP_TO = 20; // points of a line, each of which is then marked

// `lines`: [{label, color, x, y, low, high}], of which the last two only a band has.
// `named`: a single line is named as well. `range`: of the vertical axis, if charts beside one another are to share it.
// `pick`: called with a chosen step.
class Chart {
  constructor({ title, note, unit, kind, fromZero, reference, lines, named, steps, range, pick }) {
    Object.assign(this, { title, unit, kind, fromZero, reference, lines, range, pick });
    this.at = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    this.steps = steps;
    this.window = 1;
    this.place = null;
    this.plot = element("div", {
      class: "plot",
      tabindex: "0",
      role: "slider",
      "aria-label": `${title}${unit ? `, ${unit}` : ""}${note ? `, ${note}` : ""}, by step`,
      "aria-valuemin": this.at[0],
      "aria-valuemax": this.at.at(-1),
      onkeydown: (event) => this.key(event),
      onpointermove: (event) => this.point(event),
      onpointerdown: (event) => this.point(event),
      onpointerleave: () => this.mark(null),
      onblur: () => this.mark(null),
      ondblclick: () => this.choose(),
    });
    this.tip = element("div", { class: "tip", hidden: true });
    const names = named || kind === "stack" || lines.length > 1 ? lines.map((line) => swatch(line.color, line.label)) : [];
    this.node = element(
      "figure",
      { class: "chart" },
      element(
        "figcaption",
        {},
        element("h3", {}, title, note ? element("span", { class: "note" }, ` ${note}`) : null),
        unit ? element("span", { class: "unit" }, unit) : null,
        names.length ? element("div", { class: "keys" }, ...names) : null,
      ),
      this.plot,
    );
    this.say();
  }

  draw(width, window) {
    if (width < 50) return;
    [this.width, this.window] = [width, window];
    const stacked = this.kind === "stack" ? stackedBars(this.lines, this.at, width) : null;
    const values = stacked ? [[0, stacked.top]] : this.lines.flatMap((line) => (line.low ? [line.low, line.high] : [line.y]));
    if (this.reference) values.push([this.reference[0]]);
    const [low, high] = this.range || extent(values, this.fromZero);
    const yTicks = ticks(low, high, 4);
    const labels = tickLabels(yTicks);
    const left = 10 + 7 * Math.max(...labels.map((label) => label.length));
    const [bottom, top] = [yTicks[0], yTicks.at(-1)];
    const [first, last] = [this.steps[0], Math.max(this.steps[1], this.steps[0] + 1)];
    this.inside = { left, right: width - ROOM.right };
    const pad = stacked ? stacked.width / 2 : 0;
    this.toX = (step) => left + pad + ((step - first) / (last - first)) * (width - left - ROOM.right - 2 * pad);
    this.toY = (value) => ROOM.top + (1 - (value - bottom) / (top - bottom || 1)) * (HEIGHT - ROOM.top - ROOM.bottom);
    const picture = shape("svg", { width, height: HEIGHT, "aria-hidden": "true", focusable: "false" });
    yTicks.forEach((value, i) => {
      picture.append(
        shape("line", { class: "grid", x1: left, x2: width - ROOM.right, y1: this.toY(value), y2: this.toY(value) }),
        shape("text", { class: "tick", x: left - 6, y: this.toY(value) + 4, "text-anchor": "end" }, labels[i]),
      );
    });
    const between = ticks(first, last, Math.max(3, Math.floor(width / 75))).filter(
      (step) => step >= first && step <= last && Number.isInteger(step),
    );
    for (const step of between) {
      picture.append(
        shape("text", { class: "tick", x: this.toX(step), y: HEIGHT - ROOM.bottom + 17, "text-anchor": "middle" }, String(step)),
      );
    }
    picture.append(
      shape("text", { class: "tick", x: width - ROOM.right, y: HEIGHT - 4, "text-anchor": "end" }, "step"),
      shape("line", { class: "axis", x1: left, x2: width - ROOM.right, y1: this.toY(bottom), y2: this.toY(bottom) }),
    );
    if (this.reference) this.drawReference(picture, left, width);
    if (stacked) this.drawBars(picture, stacked, top);
    else this.lines.forEach((line) => this.drawLine(picture, line));
    this.cursor = shape("g", { class: "cursor" });
    picture.append(this.cursor);
    this.plot.replaceChildren(picture, this.tip);
  }

  drawReference(picture, left, width) {
    const [value, label] = this.reference;
    const y = this.toY(value);
    picture.append(
      shape("line", { class: "reference", x1: left, x2: width - ROOM.right, y1: y, y2: y }),
      shape("text", { class: "tick", x: width - ROOM.right, y: y - 5, "text-anchor": "end" }, label),
    );
  }

  drawLine(picture, line) {
    const path = (values) => line.x.map((step, i) => `${i ? "L" : "M"}${this.toX(step).toFixed(1)} ${this.toY(values[i]).toFixed(1)}`).join("");
    const color = `c${line.color % 8}`;
    if (line.low) {
      const back = [...line.x.keys()].reverse().map((i) => `L${this.toX(line.x[i]).toFixed(1)} ${this.toY(line.low[i]).toFixed(1)}`);
      picture.append(shape("path", { class: `band ${color}`, d: `${path(line.high)}${back.join("")}Z` }));
    }
    if (this.window > 1) picture.append(shape("path", { class: `line raw ${color}`, d: path(line.y) }));
    const values = smooth(line.x, line.y, this.window);
    picture.append(shape("path", { class: `line ${color}`, d: path(values) }));
    if (line.x.length <= DOTS_UP_TO) {
      line.x.forEach((step, i) =>
        picture.append(shape("circle", { class: `dot ${color}`, cx: this.toX(step), cy: this.toY(line.y[i]), r: 2.5 })),
      );
    }
  }

  drawBars(picture, stacked, top) {
    const clipped = [];
    for (const bar of stacked.bars) {
      const x = this.toX(bar.step) - stacked.width / 2;
      let below = 0;
      bar.values.forEach((value, i) => {
        const [from, to] = [Math.min(below, top), Math.min(below + value, top)];
        below += value;
        if (to > from) {
          const size = { x, y: this.toY(to), width: Math.max(stacked.width - stacked.gap, 0.5), height: this.toY(from) - this.toY(to) };
          picture.append(shape("rect", { class: `bar c${this.lines[i].color % 8}`, ...size }));
        }
      });
      if (below > top) clipped.push([bar.step, below]);
    }
    // What would flatten all the others is cut off, and says how much it is: a few of them, where there is room.
    let free = -Infinity;
    for (const [step, value] of clipped) {
      const x = this.toX(step);
      picture.append(shape("path", { class: "cut", d: `M${x - 4} ${ROOM.top + 7}l4 -6l4 6z` }));
      if (x > free) {
        const end = x > this.inside.right - 60;
        const label = `${written(value, 3)} ${this.unit.split(" ")[0] === "seconds" ? "s" : ""}`.trim();
        picture.append(
          shape("text", { class: "tick strong", x: x + (end ? -8 : 8), y: ROOM.top + 8, "text-anchor": end ? "end" : "start" }, label),
        );
        free = x + 60;
      }
    }
  }

  key(event) {
    const last = this.at.length - 1;
    const from = this.place ?? (event.key === "ArrowLeft" ? last + 1 : -1);
    const to = { ArrowRight: from + 1, ArrowUp: from + 1, ArrowLeft: from - 1, ArrowDown: from - 1, PageUp: from + 10, PageDown: from - 10, Home: 0, End: last }[event.key];
    if (to !== undefined) this.mark(Math.max(0, Math.min(last, to)));
    else if (event.key === "Escape") this.mark(null);
    else if (event.key === "Enter") this.choose();
    else return;
    event.preventDefault();
  }

  point(event) {
    if (!this.toX) return;
    const x = event.clientX - this.plot.getBoundingClientRect().left;
    const [first, last] = [this.toX(this.at[0]), this.toX(this.at.at(-1))];
    const step = this.at[0] + ((x - first) / (last - first || 1)) * (this.at.at(-1) - this.at[0]);
    this.mark(nearest(this.at, step));
  }

  choose() {
    if (this.place !== null) this.pick(this.at[this.place]);
  }

  // What each line says at a step, or nearest to it where it says nothing there.
  said(step) {
    return this.lines.map((line) => {
      const i = nearest(line.x, step);
      return { line, step: line.x[i], value: line.y[i], low: line.low?.[i], high: line.high?.[i] };
    });
  }

  mark(place) {
    this.place = place;
    this.say();
    if (!this.cursor) return;
    this.tip.hidden = place === null;
    this.cursor.replaceChildren();
    if (place === null) return;
    const step = this.at[place];
    const x = this.toX(step);
    this.cursor.append(shape("line", { x1: x, x2: x, y1: ROOM.top, y2: HEIGHT - ROOM.bottom }));
    const lines = this.said(step).map(({ line, value, low, high, step: own }) => {
      if (this.kind !== "stack") this.cursor.append(shape("circle", { class: `c${line.color % 8}`, cx: this.toX(own), cy: this.toY(value), r: 4 }));
      const spread = low === undefined ? "" : ` (${written(low)} to ${written(high)})`;
      const elsewhere = own === step ? "" : `, step ${own}`;
      return element("div", {}, swatch(line.color, `${this.lines.length > 1 ? `${line.label} ` : ""}`), element("b", {}, written(value)), spread, elsewhere);
    });
    this.tip.replaceChildren(element("div", { class: "tip-step" }, `step ${step}`), ...lines);
    const room = this.width - this.tip.offsetWidth - 4;
    this.tip.style.left = `${Math.max(4, Math.min(room, x + (x > this.width / 2 ? -this.tip.offsetWidth - 12 : 12)))}px`;
  }

  // For who listens to the page: the step that is marked, or the ends of the lines.
  say() {
    const step = this.place === null ? this.at.at(-1) : this.at[this.place];
    const values = this.said(step).map(({ line, value }) => `${this.lines.length > 1 ? `${line.label} ` : ""}${written(value)}`);
    this.plot.setAttribute("aria-valuenow", step);
    this.plot.setAttribute("aria-valuetext", `step ${step}: ${values.join(", ")}`);
  }
}

// Bars of all steps, or of means over several where they would be narrower than three pixels. The axis ends a little
// above the usual bar.
function stackedBars(lines, at, width) {
  const byStep = new Map(at.map((step) => [step, lines.map(() => 0)]));
  lines.forEach((line, i) => line.x.forEach((step, j) => (byStep.get(step)[i] = line.y[j])));
  const together = Math.max(1, Math.ceil((3 * at.length) / Math.max(width - 60, 60)));
  const bars = [];
  for (let start = 0; start < at.length; start += together) {
    const steps = at.slice(start, start + together);
    const values = lines.map((_, i) => steps.reduce((sum, step) => sum + byStep.get(step)[i], 0) / steps.length);
    bars.push({ step: (steps[0] + steps.at(-1)) / 2, values });
  }
  const sums = bars.map((bar) => bar.values.reduce((sum, value) => sum + value, 0));
  const [usual, highest] = [quantile(sums, 0.9), Math.max(...sums)];
  const barWidth = Math.min(40, (width - 60) / Math.max(bars.length, 1));
  return { bars, top: usual > 0 && highest > 1.5 * usual ? 1.25 * usual : highest, width: barWidth, gap: barWidth > 4 ? 1 : 0 };
}
