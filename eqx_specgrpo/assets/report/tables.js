// What is told in tables: what a run came to, where its time went, how it was set, and on what it ran.

const MISSING = "–";

function ends(run, key) {
  const both = run.ends[key];
  if (!both) return MISSING;
  return `${written(both[0], 3)} → ${written(both[1], 3)} (${signed(both[1] - both[0], 2)})`;
}

function seconds(value) {
  if (value === null || value === undefined) return MISSING;
  const size = Math.abs(value);
  if (size < 120) return `${written(value, 3)} s`;
  const [hours, minutes] = [Math.floor(size / 3600), Math.floor((size % 3600) / 60)];
  return `${value < 0 ? "−" : ""}${hours ? `${hours} h ` : ""}${minutes} min${hours ? "" : ` ${Math.floor(size % 60)} s`}`;
}

function runTitle(run, index, several) {
  return several ? swatch(index, run.name) : run.name;
}

function summary(runs) {
  const several = runs.length > 1;
  const total = (run) => run.phases.rows.reduce((sum, [, value]) => sum + value, 0);
  const balance = (run, part) => (run.speculation.balance ? signed(run.speculation.balance[part]) : MISSING);
  const compared = (run, tell) => (run.speculation.comparison ? tell(run.speculation.comparison) : MISSING);
  const facts = [
    ["Steps", (run) => `${run.done}${run.steps ? ` of ${run.steps}` : ""}`],
    ["Reward, first → last", (run) => ends(run, "reward")],
    ["Length, first → last (tokens)", (run) => ends(run, "completions/mean_length")],
    ["Entropy, first → last (nats a token)", (run) => ends(run, "entropy")],
    ["Acceptance length, first → last (tokens a pass)", (run) => ends(run, "spec/acceptance_length")],
    ["Time", (run) => `${seconds(total(run))}${run.phases.whole ? "" : ", steps alone"}`],
    [
      "Decoding at the end (tokens a second)",
      (run) => compared(run, (c) => `${written(c.speculative, 3)} with the draft, ${written(c.plain, 3)} plain: ${written(c.ratio, 3)} ×`),
    ],
    [
      "Saved by speculation, if above 0 (seconds)",
      (run) => (run.speculation.balance ? `${balance(run, "total")}: rollouts ${balance(run, "rollouts")}, the draft's learning ${balance(run, "draft")}, compiling ${balance(run, "compiling")} (${run.speculation.balance.basis})` : MISSING),
    ],
  ];
  const told = facts.map(([name, tell]) => [name, ...runs.map(tell)]).filter(([, ...cells]) => cells.some((cell) => cell !== MISSING));
  return section(
    "Summary",
    table(["", ...runs.map((run, i) => runTitle(run, i, several))], told.map((cells) => row(cells)), "Summary"),
    element("p", { class: "small" }, "First and last: means of five steps at either end, in a run of under ten of its halves."),
  );
}

function times(runs) {
  const several = runs.length > 1;
  const tables = runs.map((run, i) => {
    const sum = run.phases.rows.reduce((total, [, value]) => total + value, 0);
    const rows = run.phases.rows.map(([phase, value, compiling]) =>
      row([phase, written(value, 3), `${Math.round((100 * value) / (sum || 1))} %`, compiling === null ? MISSING : written(compiling, 3)]),
    );
    rows.push(row(["in all", written(sum, 4), "", ""], { class: "sum" }));
    return element(
      "div",
      {},
      several ? element("h3", {}, runTitle(run, i, several)) : null,
      table([run.phases.whole ? "whole run" : "its steps", "seconds", "share", "of it compiling"], rows, `Times of ${run.name}`),
    );
  });
  return section("Where the time went", element("div", { class: "beside" }, ...tables));
}

// A row for each key, marked where the runs differ: by a sign as well, for who sees no colors.
function comparisonTable(title, runs, trees, caption) {
  const several = runs.length > 1;
  const keys = [...new Set(trees.flatMap((tree) => Object.keys(tree)))];
  if (!keys.length) return null;
  const text = (value) =>
    value === undefined ? MISSING : Array.isArray(value) ? `[${value.map(text).join(", ")}]` : typeof value === "string" ? value : JSON.stringify(value);
  // Long names break where their words do.
  const words = (key) => key.split(/(?<=[._])/).flatMap((word) => [word, element("wbr")]);
  let differing = 0;
  const rows = keys.map((key) => {
    const values = trees.map((tree) => text(tree[key]));
    const differs = values.some((value) => value !== values[0]);
    differing += differs;
    const sign = differs ? element("span", { class: "differs-sign", title: "differs" }, "≠ ") : null;
    return row([element("span", {}, sign, ...words(key)), ...values], { class: differs ? "differs" : "same" });
  });
  const shown = table(["", ...runs.map((run, i) => runTitle(run, i, several))], rows, caption);
  if (!several) return section(title, shown);
  const only = element("input", { type: "checkbox", onchange: () => shown.classList.toggle("only-differences", only.checked) });
  only.checked = differing > 0;
  shown.classList.toggle("only-differences", only.checked);
  const label = `Only what differs (${differing} of ${keys.length})`;
  return section(title, element("label", { class: "only" }, only, label), shown);
}

function configuration(runs) {
  return comparisonTable("Configuration", runs, runs.map((run) => run.config), "Configuration");
}

function machines(runs) {
  const flat = (tree, prefix = "") =>
    Object.entries(tree).flatMap(([key, value]) =>
      value !== null && typeof value === "object" && !Array.isArray(value) ? flat(value, `${prefix}${key}.`) : [[`${prefix}${key}`, value]],
    );
  // The last start is told; of those before it, how many there were.
  const trees = runs.map((run) => {
    const last = run.machines.at(-1);
    if (!last) return {};
    const earlier = run.machines.length > 1 ? { starts: run.machines.length } : {};
    return { ...earlier, ...Object.fromEntries(flat(last)) };
  });
  return comparisonTable("Machine", runs, trees, "What it ran on, at its last start");
}
