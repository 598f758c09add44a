// Images that go with the next message: chosen, dropped or pasted.

import { h } from "./dom.js";

const MAX_SIDE = 1568; // pixels; larger images are scaled down before they are sent

export class Pictures {
  element = h("div", { class: "thumbs" });
  urls = [];

  // onfault: shows a text.
  constructor(onfault) {
    this.onfault = onfault;
  }

  // Takes the images of what was dropped or pasted. Pasted text goes its own way; a browser would open a dropped file.
  takeFrom(transfer, event) {
    const files = [...(transfer?.files ?? [])].filter((each) => event.type === "drop" || each.type.startsWith("image/"));
    if (!files.length) return;
    event.preventDefault();
    this.take(files);
  }

  async take(files) {
    for (const each of files) {
      try {
        this.urls.push(await dataUrl(each));
      } catch {
        this.onfault(`${each.name} is no image that this browser can read.`);
      }
    }
    this.#draw();
  }

  // Gives them away.
  handOver() {
    const given = this.urls;
    this.urls = [];
    this.#draw();
    return given;
  }

  #draw() {
    this.element.replaceChildren(...this.urls.map((url, n) => h("button", { type: "button", class: "thumb", "aria-label": `Remove image ${n + 1}`, onclick: () => {
      this.urls.splice(n, 1);
      this.#draw();
    } }, h("img", { src: url, alt: "" }))));
  }
}

// An image as a data URL, no larger than models use.
async function dataUrl(file) {
  const picture = await createImageBitmap(file);
  const scale = Math.min(1, MAX_SIDE / Math.max(picture.width, picture.height));
  if (scale === 1 && file.size < 1_000_000 && /png|jpeg|webp|gif/.test(file.type)) {
    return new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = reject;
      reader.readAsDataURL(file);
    });
  }
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(picture.width * scale);
  canvas.height = Math.round(picture.height * scale);
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.9);
}
