// A page that is read from a folder (file://) may not start a worker, and the search runs in one. There the worker's
// script runs in a hidden frame. The theme loads a shim of this name from elsewhere unless the site has one.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.srcdoc = "<!doctype html><title>search</title>"
      this.frame.addEventListener("load", () => this.begin(new URL(url, location.href).href), { once: true })
      document.body.append(this.frame)
    }

    begin(url) {
      const inner = this.frame.contentWindow
      const load = (source) =>
        new Promise((loaded, failed) => {
          const script = inner.document.createElement("script")
          Object.assign(script, { src: source, onload: loaded, onerror: failed })
          inner.document.body.append(script)
        })
      inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      inner.importScripts = (...sources) => Promise.all(sources.map(load))
      load(url).then(() => {
        this.deliver = (data) => inner.dispatchEvent(new inner.MessageEvent("message", { data }))
        this.waiting.splice(0).forEach(this.deliver)
      })
    }

    postMessage(data) {
      if (this.deliver) this.deliver(data)
      else this.waiting.push(data)
    }

    terminate() {
      this.frame.remove()
    }
  }
}
