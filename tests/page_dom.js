// As much of a browser's document as the report's script uses, so that tests can run it where there is no browser:
// `node page_dom.js PAGE.html ACTIONS.js` runs the page's scripts, then the actions, and prints what they return as JSON.
"use strict";
const fs = require("fs");
const vm = require("vm");

class Node_ {
  constructor(name) {
    Object.assign(this, { name, children: [], attributes: {}, listeners: {}, style: {}, parent: null, hidden: false });
    this.clientWidth = 360;
    this.offsetWidth = 100;
    this.selected = 0;
  }
  append(...children) {
    for (const child of children) {
      const node = child instanceof Node_ ? child : new Text_(String(child));
      node.parent = this;
      this.children.push(node);
    }
  }
  replaceChildren(...children) {
    this.children = [];
    this.append(...children);
  }
  setAttribute(name, value) {
    this.attributes[name] = String(value);
    if (name === "hidden") this.hidden = true;
    if (name === "id") byId[value] = this;
    if (name === "value") this.own = String(value);
  }
  get id() { return this.attributes.id; }
  get textContent() { return this.children.map((child) => child.textContent).join(""); }
  set textContent(text) { this.replaceChildren(text); }
  get options() { return this.all((node) => node.name === "option"); }
  get selectedIndex() { return this.selected; }
  set selectedIndex(index) { this.selected = index; }
  get value() { return this.name === "select" ? this.options[this.selected]?.attributes.value ?? "" : this.own ?? ""; }
  set value(value) {
    if (this.name === "select") this.selected = this.options.findIndex((option) => option.attributes.value === String(value));
    else this.own = String(value);
  }
  get classList() {
    return { toggle: (name, on) => (this.attributes.class = [...this.classes().filter((other) => other !== name), ...(on ? [name] : [])].join(" ")) };
  }
  classes() { return (this.attributes.class ?? "").split(" "); }
  all(wanted) { return this.children.flatMap((child) => (child instanceof Text_ ? [] : [...(wanted(child) ? [child] : []), ...child.all(wanted)])); }
  querySelector(name) { return this.all((node) => node.name === name)[0] ?? null; }
  addEventListener(name, listener) { this.listeners[name] = listener; }
  fire(name, event = {}) { this.listeners[name]({ preventDefault() {}, ...event }); }
  getBoundingClientRect() { return { left: 0, top: 0, width: this.clientWidth, height: 190 }; }
  scrollIntoView() { this.scrolledTo = true; }
  focus() {}
}
class Text_ extends Node_ {
  constructor(text) {
    super("#text");
    this.text = text;
  }
  get textContent() { return this.text; }
}

const byId = {};
const body = new Node_("body");
const document = {
  body,
  createElement: (name) => new Node_(name),
  createElementNS: (_, name) => new Node_(name),
  getElementById: (id) => byId[id],
};
for (const id of ["head", "content", "foot", "data"]) {
  const node = new Node_("div");
  node.setAttribute("id", id);
  body.append(node);
}

// An HTML parser ends a script at the first closing tag, whatever is in it.
const html = fs.readFileSync(process.argv[2], "utf8");
const scripts = [...html.matchAll(/<script([^>]*)>([\s\S]*?)<\/script/g)];
const context = vm.createContext({ document, console, ResizeObserver: class { constructor(call) { this.call = call; } observe() { this.call(); } } });
for (const [, attributes, text] of scripts) {
  if (attributes.includes("application/json")) byId.data.textContent = text;
  else vm.runInContext(text, context);
}
context.scripts = scripts.length;
context.body = body;
console.log(JSON.stringify(vm.runInContext(fs.readFileSync(process.argv[3], "utf8"), context)));
