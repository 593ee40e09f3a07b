// Completions to read: of a step, best or worst first, with the words that are looked for.

const AT_ONCE = 20;
const ORDERS = {
  "as they came": () => 0,
  "best first": (a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity),
  "worst first": (a, b) => (a.reward ?? Infinity) - (b.reward ?? Infinity),
  "longest first": (a, b) => (b.length ?? 0) - (a.length ?? 0),
  "shortest first": (a, b) => (a.length ?? 0) - (b.length ?? 0),
  "latest first": (a, b) => b.step - a.step,
};

// Those of a run that are asked for; `words` have to be in the prompt or in the completion, in any case.
function matching(completions, { step = null, words = "", order = "as they came", stop = "" }) {
  const wanted = words.toLowerCase();
  const found = completions.rows.filter(
    (row) =>
      (step === null || row.step === step) &&
      (!stop || row.stop === stop) &&
      (!wanted || row.text.toLowerCase().includes(wanted) || promptText(completions, row).toLowerCase().includes(wanted)),
  );
  return found.sort(ORDERS[order]); // in place, and stable: equals stay as they came
}

function promptText(completions, row) {
  return completions.prompts[row.prompt].map(([, text]) => text).join("\n");
}

// Pieces of a text, every second of which is what was looked for.
function pieces(text, words) {
  if (!words) return [text];
  const [lower, wanted] = [text.toLowerCase(), words.toLowerCase()];
  const found = [];
  let from = 0;
  for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, from)) {
    found.push(text.slice(from, at), text.slice(at, at + wanted.length));
    from = at + wanted.length;
  }
  return [...found, text.slice(from)];
}

function marked(text, words) {
  return pieces(text, words).map((piece, i) => (i % 2 ? element("mark", {}, piece) : piece));
}

class Completions {
  constructor(runs) {
    this.runs = runs.filter((run) => run.completions.rows.length);
    if (!this.runs.length) return;
    this.run = this.runs[0];
    this.limit = AT_ONCE;
    const change = () => {
      this.limit = AT_ONCE;
      this.show();
    };
    const choices = (names) => names.map(([value, label]) => element("option", { value }, label));
    this.ofRun = element("select", { onchange: () => this.take(this.ofRun.selectedIndex) }, ...choices(this.runs.map((run, i) => [i, run.name])));
    this.step = element("select", { onchange: change });
    this.order = element("select", { onchange: change }, ...choices(Object.keys(ORDERS).map((order) => [order, order])));
    this.stop = element("select", { onchange: change }, ...choices([["", "any"], ["eos", "by itself"], ["length", "cut at the longest"]]));
    this.words = element("input", { type: "search", placeholder: "words", oninput: change });
    const field = (label, ...inputs) => element("label", {}, element("span", {}, label), ...inputs);
    const turn = (by, label, text) => element("button", { type: "button", "aria-label": label, onclick: () => this.turn(by) }, text);
    this.count = element("p", { class: "count", role: "status" });
    this.list = element("ol", { class: "completions" });
    this.more = element("button", { type: "button", class: "more", onclick: () => this.showMore() }, "Show more");
    this.node = section(
      "Completions to read",
      element(
        "form",
        { class: "filters", onsubmit: (event) => event.preventDefault() },
        this.runs.length > 1 ? field("Run", this.ofRun) : null,
        element("div", { class: "stepper" }, field("Step", this.step), turn(-1, "Step before", "‹"), turn(1, "Next step", "›")),
        field("Order", this.order),
        field("Ended", this.stop),
        field("Search", this.words),
      ),
      this.count,
      this.list,
      this.more,
    );
    this.take(0);
  }

  take(index) {
    this.run = this.runs[index];
    this.limit = AT_ONCE;
    const before = this.step.value;
    this.steps = [...new Set(this.run.completions.rows.map((row) => row.step))];
    const options = [["", "all"], ...this.steps.map((step) => [step, step])];
    this.step.replaceChildren(...options.map(([value, label]) => element("option", { value }, String(label))));
    this.step.value = this.steps.includes(Number(before)) ? before : "";
    this.show();
  }

  turn(by) {
    const options = this.step.options.length;
    this.step.selectedIndex = Math.max(0, Math.min(options - 1, this.step.selectedIndex + by));
    this.limit = AT_ONCE;
    this.show();
  }

  // From a chart: the completions of a step of a run, or of the nearest step that some are kept of.
  read(name, step) {
    const index = Math.max(0, this.runs.findIndex((run) => run.name === name));
    this.ofRun.selectedIndex = index;
    this.take(index);
    this.step.value = String(this.steps[nearest(this.steps, step)]);
    [this.words.value, this.stop.value] = ["", ""];
    this.show();
    this.node.scrollIntoView({ block: "start" });
    this.step.focus({ preventScroll: true });
  }

  show() {
    const step = this.step.value === "" ? null : Number(this.step.value);
    const found = matching(this.run.completions, { step, words: this.words.value.trim(), order: this.order.value, stop: this.stop.value });
    const { of, rows } = this.run.completions;
    const kept = rows.length < of ? `, of ${rows.length.toLocaleString("en")} in this page (whole steps spread over the run, and its best and worst); all ${of.toLocaleString("en")} are in completions.jsonl` : "";
    this.count.textContent = `${found.length.toLocaleString("en")} completion${found.length === 1 ? "" : "s"}${kept}`;
    this.found = found;
    this.list.replaceChildren(...found.slice(0, this.limit).map((row) => this.card(row)));
    this.more.hidden = found.length <= this.limit;
  }

  showMore() {
    const first = this.limit;
    this.limit += AT_ONCE;
    this.show();
    this.list.children[first]?.querySelector("pre")?.focus({ preventScroll: true });
  }

  card(row) {
    const words = this.words.value.trim();
    const fact = (name, value) => element("span", { class: "fact" }, `${name} `, element("b", {}, value));
    const more = Object.entries(row.more).map(([name, value]) => fact(name, typeof value === "object" ? JSON.stringify(value) : written(value)));
    const prompt = this.run.completions.prompts[row.prompt].flatMap(([role, text]) => [
      role ? element("span", { class: "role" }, role) : null,
      element("pre", {}, ...marked(text, words)),
    ]);
    return element(
      "li",
      {},
      element(
        "div",
        { class: "facts" },
        fact("step", String(row.step)),
        fact("reward", written(row.reward)),
        fact("advantage", row.advantage === null ? "–" : signed(row.advantage)),
        fact("tokens", written(row.length)),
        row.stop === "length" ? element("span", { class: "fact cut-off" }, "cut at the longest") : null,
        ...more,
      ),
      element("div", { class: "prompt" }, ...prompt.filter((part) => part !== null)),
      element("pre", { class: "text", tabindex: "-1" }, ...marked(row.text, words)),
    );
  }
}
