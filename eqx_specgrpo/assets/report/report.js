// Puts the page together: charts that follow the width, one slider for their smoothing, and what is to be read.

const MOST_SMOOTHING = 200; // steps

// The lines of a chart of one run, or, of a single metric, of all of them.
function linesOf(spec, runs, colorOf) {
  const lines = [];
  for (const [index, run] of runs) {
    const found = spec.series.filter(({ key }) => run.metrics[key]);
    if (spec.kind === "band" && found.length === spec.series.length) {
      const [middle, low, high] = spec.series.map(({ key }) => run.metrics[key]);
      lines.push({ label: run.name, color: colorOf(index, 0), x: middle.x, y: middle.y, low: low.y, high: high.y });
    } else if (spec.kind !== "band") {
      found.forEach(({ key, label }) => {
        const number = spec.series.findIndex((series) => series.key === key);
        lines.push({ label: spec.series.length > 1 ? label : run.name, color: colorOf(index, number), ...run.metrics[key] });
      });
    }
  }
  return lines;
}

// One chart for all runs where each is one line of it, else one a run beside one another, on the same axis.
function chartsOf(spec, runs, pick) {
  const numbered = [...runs.entries()];
  const steps = extent(runs.flatMap((run) => Object.values(run.metrics).map(({ x }) => [x[0], x.at(-1)])), false);
  const make = (group, note, colorOf, range) => {
    const lines = linesOf(spec, group, colorOf);
    if (!lines.length) return [];
    const { title, unit, kind, fromZero, reference } = spec;
    const named = runs.length > 1 && !note;
    const read = (step) => pick(group[0][1].name, step);
    return [new Chart({ title, note, unit, kind, fromZero, reference, lines, named, steps, range, pick: read })];
  };
  if (runs.length === 1) return make(numbered, "", (_, series) => series);
  if (spec.series.length === 1 || spec.kind === "band") return make(numbered, "", (run) => run);
  const values = runs.flatMap((run) => spec.series.map(({ key }) => run.metrics[key]?.y ?? []));
  const range = spec.kind === "stack" ? null : extent(values, spec.fromZero);
  return numbered.flatMap((one) => make([one], one[1].name, (_, series) => series, range));
}

function heading(data) {
  const { runs } = data;
  const under = runs.map((run) => {
    const state = run.steps && run.done < run.steps ? `step ${run.done} of ${run.steps} when this page was made` : `${run.done} steps`;
    const what = ["model.path", "task.name"].map((key) => run.config[key]).filter(Boolean).map((text) => String(text).split("/").at(-1));
    return element("p", { class: "under" }, `${runs.length > 1 ? `${run.name}: ` : ""}${[...what, state].join(", ")}`);
  });
  const notices = runs.flatMap((run) =>
    Object.entries(run.unreadable).map(([file, count]) =>
      element("p", { class: "notice" }, `${run.name}: ${count} line${count === 1 ? "" : "s"} of ${file} could not be read, as the last one of a run that is going on, and ${count === 1 ? "is" : "are"} left out.`),
    ),
  );
  return [element("h1", {}, runs.map((run) => run.name).join(" and ")), ...under, ...notices];
}

function controls(titles, runs, longest, change) {
  const value = longest >= 10 ? Math.min(MOST_SMOOTHING, Math.max(5, Math.round(longest / 100))) : 1;
  const said = element("output", {}, "");
  const slider = element("input", {
    type: "range",
    min: "1",
    max: String(Math.max(2, Math.min(MOST_SMOOTHING, Math.floor(longest / 2)))),
    value: String(value),
    oninput: () => tell(),
  });
  const tell = () => {
    const window = Number(slider.value);
    said.textContent = window === 1 ? "off" : `mean of ${window} steps`;
    change(window);
  };
  const links = titles.map(([id, title]) => element("a", { href: `#${id}` }, title));
  const legend = runs.length > 1 ? element("div", { class: "keys" }, ...runs.map((run, i) => swatch(i, run.name))) : null;
  const node = element(
    "nav",
    { "aria-label": "Sections and smoothing" },
    element("div", { class: "links" }, ...links),
    element("div", { class: "controls" }, legend, element("label", {}, "Smoothing ", slider, " ", said)),
  );
  return { node, tell };
}

function start(data) {
  const { runs } = data;
  const reader = new Completions(runs);
  const pick = (name, step) => reader.node && reader.read(name, step);
  const charts = [];
  const curves = data.sections.map(({ title, charts: specs }) => {
    const made = specs.flatMap((spec) => chartsOf(spec, runs, pick));
    charts.push(...made);
    const grid = element("div", { class: "charts" }, ...made.map((chart) => chart.node));
    // What few look at is drawn where it is asked for.
    return title === "Other metrics" ? section(title, element("details", { ontoggle: () => draw() }, element("summary", {}, `${made.length} more curves`), grid)) : section(title, grid);
  });
  const parts = [summary(runs), ...curves, times(runs), reader.node ?? null, configuration(runs), machines(runs)].filter((part) => part);
  let window_ = 1;
  const draw = () => charts.forEach((chart) => chart.draw(chart.plot.clientWidth, window_));
  const longest = Math.max(...runs.map((run) => run.done));
  const titles = parts.map((part) => [part.id, part.querySelector("h2").textContent]);
  const { node, tell } = controls(titles, runs, longest, (window) => {
    window_ = window;
    draw();
  });
  document.getElementById("head").append(...heading(data), node);
  document.getElementById("content").append(...parts);
  document.getElementById("foot").append(
    element("p", {}, `Made ${data.made.replace("T", " ")} from ${runs.map((run) => run.folder).join(" and ")}. A double click or Enter on a curve shows the completions of that step.`),
  );
  tell();
  let width = 0;
  new ResizeObserver(() => {
    if (width !== document.body.clientWidth) draw();
    width = document.body.clientWidth;
  }).observe(document.body);
}

start(JSON.parse(document.getElementById("data").textContent));
