// The frame of the page: views by the address, the connection, colours, keys.

import { askForKey, errorText, get, post, send } from "./api.js";
import { h, openDialog, say, setText } from "./dom.js";
import { follow, live, retry, watch } from "./live.js";

const VIEWS = {
  overview: ["Overview", () => import("./overview.js")],
  chat: ["Chat", () => import("./chat.js")],
  compare: ["Compare", () => import("./compare.js")],
  bench: ["Benchmark", () => import("./bench.js")],
  requests: ["Requests", () => import("./requests.js")],
  library: ["Library", () => import("./library.js")],
};
const ICONS = {
  overview: "M3 3h7v8H3zM14 3h7v5h-7zM14 12h7v9h-7zM3 15h7v6H3z",
  chat: "M4 4h16v12H9l-5 4z",
  compare: "M4 4h7v16H4zM13 4h7v16h-7z",
  bench: "M4 20V10M10 20V4M16 20v-8M22 20H2",
  requests: "M4 6h16M4 12h16M4 18h10",
  library: "M5 3v18M9 3v18M13 4l6 17",
};
const THEMES = ["auto", "light", "dark"];

export const session = { needs_key: false, may_generate: false, may_manage: false };

const main = document.getElementById("main");
let leaving = null; // ends what the view in sight has running
let shown = null;
let isMissing = false; // the view in sight could not be loaded

const decoded = (part) => {
  try {
    return decodeURIComponent(part);
  } catch { return part; }
};

function icon(name) {
  const ns = "http://www.w3.org/2000/svg";
  const shape = document.createElementNS(ns, "svg");
  shape.setAttribute("viewBox", "0 0 24 24");
  shape.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(ns, "path");
  path.setAttribute("d", ICONS[name]);
  shape.append(path);
  return shape;
}

document.getElementById("nav").append(...Object.entries(VIEWS).map(([name, [title]]) =>
  h("a", { href: `#/${name}`, id: `nav-${name}` }, icon(name), h("span", { text: title }))));

async function route() {
  const [name, ...rest] = location.hash.replace(/^#\/?/, "").split("/");
  const view = Object.hasOwn(VIEWS, name) ? name : "overview";
  leaving?.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  for (const each of Object.keys(VIEWS)) {
    const link = document.getElementById(`nav-${each}`);
    if (each === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  let module;
  isMissing = false;
  try {
    module = await VIEWS[view][1]();
  } catch {
    isMissing = !signal.aborted;
    if (isMissing) main.replaceChildren(h("p", { class: "fault", role: "alert", text: "This view is not here yet: the server can't be reached." }));
  }
  if (signal.aborted || isMissing) return;
  document.title = `${VIEWS[view][0]} – MLX Server`;
  main.className = `view-${view}`;
  document.body.dataset.view = view;
  main.replaceChildren();
  module.show(main, { signal, session, rest: rest.map(decoded) });
  if (shown && shown !== view) main.focus({ preventScroll: true });
  shown = view;
}

// -- the connection ---------------------------------------------------------------------------------------------------

let wasLost = false;
watch(() => {
  const link = document.getElementById("link");
  const notice = document.getElementById("notice");
  const texts = { connected: "Connected", lost: "Not connected", stopping: "Stopping", refused: "Key needed", connecting: "Connecting", resting: "Connecting" };
  setText(link, texts[live.link]);
  link.dataset.state = live.link;
  const isGone = live.link === "lost" || live.link === "stopping";
  if (isGone) wasLost = true;
  setText(notice, isGone ? "The connection to the server is lost. Trying again …" : "");
  notice.hidden = !isGone;
  if (live.link === "connected" && wasLost) {
    wasLost = false;
    say("Connected again");
    link.textContent = "Connected again";
    setTimeout(() => setText(link, texts[live.link]), 4000);
    loadSession();
    if (isMissing) route();
  }
});
addEventListener("online", retry);

// -- keys -------------------------------------------------------------------------------------------------------------

async function loadSession() {
  try {
    Object.assign(session, await get("page/session"));
  } catch { return; }
  document.getElementById("sign-out").hidden = !(session.needs_key && session.may_generate);
  if (session.needs_key && !session.may_generate) askKey();
}

let keyDialog = null;
function askKey() {
  if (keyDialog) return;
  const field = h("input", { id: "key", type: "password", autocomplete: "current-password", required: true });
  const fault = h("p", { class: "fault", role: "alert" });
  const form = h("form", { class: "stack", onsubmit: async (event) => {
    event.preventDefault();
    fault.textContent = "";
    try {
      Object.assign(session, await post("page/session", { key: field.value.trim() }));
      keyDialog.close();
      document.getElementById("sign-out").hidden = !session.needs_key;
      retry();
      route();
    } catch (error) {
      fault.textContent = errorText(error);
      field.select();
    }
  } },
  h("p", { text: "This server asks for an API key, or an admin key to manage models. It is kept in a cookie that no script can read." }),
  h("label", { for: "key", text: "Key" }), field, fault, h("button", { class: "primary", text: "Sign in" }));
  keyDialog = openDialog("Sign in", form, { onclose: () => { keyDialog = null; } });
  field.focus();
}
askForKey(askKey);
document.getElementById("sign-out").addEventListener("click", async () => {
  await send("DELETE", "page/session");
  location.reload();
});

// -- colours ----------------------------------------------------------------------------------------------------------

const themeButton = document.getElementById("theme");
function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    if (theme === "auto") localStorage.removeItem("mlx.theme");
    else localStorage.setItem("mlx.theme", theme);
  } catch { /* not kept */ }
  themeButton.textContent = { auto: "◐", light: "☀", dark: "☾" }[theme];
  themeButton.setAttribute("aria-label", `Colours: ${theme}`);
  themeButton.title = `Colours: ${theme}`;
}
themeButton.addEventListener("click", () => {
  const now = document.documentElement.dataset.theme ?? "auto";
  setTheme(THEMES[(THEMES.indexOf(now) + 1) % 3]);
});
setTheme(document.documentElement.dataset.theme ?? "auto");

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
addEventListener("hashchange", route);
await loadSession();
const first = route();
follow();
await first;
for (const [, load] of Object.values(VIEWS)) load().catch(() => {}); // they are here if the server is not
