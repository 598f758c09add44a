// The place in a conversation that is scrolled: its end, until the reader scrolls up. Then what is in view stays where it
// is, whatever grows above it: WebKit anchors nothing, and what the other browsers anchor moves with what streams.

const PROBES = [0.02, 0.2, 0.4, 0.6, 0.8, 0.98]; // of the height in view: where to look for what is there

export class Place {
  #follows = true;
  #top = 0;
  #anchors = []; // [element, its pixels below the upper edge], the best first

  constructor(scroller, content, signal) {
    this.scroller = scroller;
    this.content = content;
    scroller.addEventListener("scroll", () => this.#scrolled());
    const sizes = new ResizeObserver(() => this.hold());
    for (const each of [scroller, content]) sizes.observe(each);
    signal.addEventListener("abort", () => sizes.disconnect());
  }

  toEnd() {
    this.#follows = true;
    this.hold();
  }

  // Pixels of an element below the upper edge.
  offset(element) {
    return element.getBoundingClientRect().top - this.scroller.getBoundingClientRect().top;
  }

  // Puts an element there.
  put(element, offset) {
    this.#follows = false;
    this.#anchors = [[element, offset]];
    this.hold();
  }

  // Called when a height may have changed, before that is painted.
  hold() {
    const moved = this.scroller.scrollTop - this.#top; // by the reader, whose event is still to come
    for (const anchor of this.#anchors) anchor[1] -= moved;
    if (this.#follows) this.scroller.scrollTop = this.scroller.scrollHeight;
    else {
      const [anchor, offset] = this.#anchors.find(([element]) => element.isConnected) ?? [];
      const shift = anchor ? this.offset(anchor) - offset : 0;
      if (Math.abs(shift) >= 1) this.scroller.scrollTop += shift;
    }
    this.#top = this.scroller.scrollTop;
  }

  #scrolled() {
    const before = this.#top;
    this.#top = this.scroller.scrollTop;
    const left = this.scroller.scrollHeight - this.#top - this.scroller.clientHeight;
    if (this.#top < before && left > 4) this.#follows = false;
    else if (left <= 4 || (this.#top > before && left < 80)) this.#follows = true;
    if (!this.#follows) this.#mark();
  }

  // What is in view. That which begins there comes first: what begins above may be laid out anew in other heights. A text
  // that streams is none, for it loses its beginning to what is rendered.
  #mark() {
    const view = this.scroller.getBoundingClientRect();
    const found = new Set();
    for (const share of PROBES) {
      const hit = document.elementFromPoint(view.left + view.width / 2, view.top + share * view.height);
      let element = hit?.closest(".tail")?.parentElement ?? hit;
      for (; element && element !== this.content && this.content.contains(element); element = element.parentElement) found.add(element);
    }
    const anchors = [...found].map((element) => [element, this.offset(element)]);
    if (!anchors.length) return; // something lies above it
    this.#anchors = [...anchors.filter(([, offset]) => offset >= 0).sort((a, b) => a[1] - b[1]),
      ...anchors.filter(([, offset]) => offset < 0).sort((a, b) => b[1] - a[1])];
  }
}
