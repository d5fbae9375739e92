// The page: which prompts there are, which are chosen, and one card per chosen one.

import { get } from "./api.js";
import { Card, number } from "./card.js";
import { showNearest } from "./nearest.js";

const $ = (id) => document.getElementById(id);
const MOST = 6; // a browser opens six connections to one server: a seventh answer would wait, and its times would lie
const DRAWN = 200; // entries of the list drawn at once; the filter finds the others
const KEY = "softprompt-key";

let models = new Map(); // id → {id, base, about, length}, in the server's order, the base first
const cards = new Map(); // id → Card, of the chosen ones
let refreshes = 0; // begun so far: what an earlier one is answered is out of date

async function refresh() {
  const turn = ++refreshes;
  notice("");
  try {
    const [served, prompts] = await Promise.all([get("v1/models", key()), get("v1/prompts", key()).catch(without)]);
    if (turn !== refreshes) return;
    const details = new Map(prompts.data.map((prompt) => [prompt.name, prompt]));
    const found = served.data.map((entry) => describe(entry, details.get(entry.id)));
    found.sort((one, other) => other.base - one.base); // stable: the rest stays in the server's order
    models = new Map(found.map((model) => [model.id, model]));
    for (const [id, card] of [...cards]) models.has(id) ? card.know(models.get(id)) : drop(id);
    if (!cards.size) found.slice(0, 3).forEach((model) => choose(model.id));
    drawRefused(prompts.data);
    $("about").textContent = summary(served.data);
  } catch (error) {
    if (turn !== refreshes) return;
    notice(error.message);
  }
  drawList();
}

/** A server with adapters but without a library of prompts answers 404; what else it says is shown. */
function without(error) {
  if (error.status === 404) return { data: [] };
  throw error;
}

function describe(entry, prompt) {
  const isBase = !entry.parent;
  const kind = prompt ? `${prompt.method.replaceAll("_", " ")}, ${number(prompt.length)} virtual tokens` : "adapter";
  const about = isBase ? "the base model alone" : kind;
  const length = isBase ? 0 : (prompt?.length ?? null);
  return { id: entry.id, base: isBase, about, length, known: Boolean(prompt) };
}

/** Prompts whose files, as they are now, the server does not serve, with its reasons. */
function drawRefused(prompts) {
  const refused = prompts.filter((prompt) => prompt.error);
  $("refused").hidden = !refused.length;
  $("refused-count").textContent = `${number(refused.length)} refused`;
  $("refused-list").replaceChildren(...refused.slice(0, DRAWN).map((prompt) => {
    const item = document.createElement("li");
    const name = document.createElement("b");
    name.textContent = prompt.name;
    item.append(name, ` ${prompt.error}`); // strings become text nodes
    return item;
  }));
}

function summary(entries) {
  const base = entries.map((entry) => entry.parent ?? entry.id)[0] ?? "nothing"; // a key may see prompts, not the base
  const count = entries.filter((entry) => entry.parent).length;
  return `${base} with ${number(count)} ${count === 1 ? "prompt" : "prompts"}`;
}

function drawList() {
  const wanted = $("filter").value.trim().toLowerCase();
  const found = [...models.values()].filter((model) => model.id.toLowerCase().includes(wanted));
  $("prompts").replaceChildren(...found.slice(0, DRAWN).map(entry));
  const more = found.length - DRAWN;
  const none = found.length || !models.size ? "" : "no such name";
  $("count").textContent = more > 0 ? `and ${number(more)} more: type a part of the name` : none;
  limit();
}

function entry(model) {
  const node = $("prompt").content.firstElementChild.cloneNode(true);
  const box = node.querySelector("input");
  node.querySelector("[data-part=name]").textContent = model.id;
  node.querySelector("[data-part=about]").textContent = model.about;
  box.value = model.id;
  box.checked = cards.has(model.id);
  box.addEventListener("change", () => (box.checked ? choose(model.id) : drop(model.id)));
  const nearest = node.querySelector("[data-part=nearest]");
  nearest.hidden = !model.known;
  nearest.setAttribute("aria-label", `Nearest tokens of ${model.id}`);
  nearest.addEventListener("click", () => showNearest(model.id, key()));
  return node;
}

function choose(id) {
  const card = new Card(models.get(id), progress);
  cards.set(id, card);
  $("answers").append(card.node);
  limit();
}

function drop(id) {
  cards.get(id).stop();
  cards.get(id).node.remove();
  cards.delete(id);
  limit();
}

function limit() {
  const full = cards.size >= MOST;
  for (const box of $("prompts").querySelectorAll("input")) box.disabled = full && !box.checked;
  $("prompts").title = full ? `${MOST} at a time: a browser opens no more connections to one server` : "";
}

async function send(event) {
  event.preventDefault();
  if (running().length) return;
  if (!cards.size) return notice("Choose a prompt, or the base model, first.");
  notice("");
  const form = new FormData($("ask"));
  const ask = { text: $("text").value, chat: form.get("api") === "chat", settings: settings(), key: key() };
  await Promise.all([...cards.values()].map((card) => card.run(ask)));
}

/** What was filled in; the server judges it, and an empty field is not sent. */
function settings() {
  const filled = [...$("ask").querySelectorAll("input[type=number]")].filter((input) => input.value !== "");
  return Object.fromEntries(filled.map((input) => [input.name, input.valueAsNumber]));
}

function running() {
  return [...cards.values()].filter((card) => card.running);
}

function cancel() {
  for (const card of running()) card.stop();
}

/** Called by the cards: the bars share one scale, the buttons know whether something runs. */
function progress() {
  const longest = Math.max(1, ...[...cards.values()].map((card) => card.total));
  for (const card of cards.values()) card.draw(longest);
  const busy = running().length > 0;
  $("cancel").disabled = !busy;
  $("send").setAttribute("aria-disabled", String(busy));
  const states = [...cards.values()].map((card) => card.node.dataset.state);
  const count = (state) => states.filter((other) => other === state).length;
  const found = ["running", "done", "cancelled", "failed"].filter(count);
  const words = found.map((state) => `${count(state)} ${state}`).join(", ");
  if ($("status").textContent !== words) $("status").textContent = words;
}

function key() {
  return sessionStorage.getItem(KEY) ?? "";
}

function notice(words) {
  $("notice").textContent = words;
  $("notice").hidden = !words;
}

function start() {
  $("key").value = key();
  $("key").addEventListener("change", () => {
    sessionStorage.setItem(KEY, $("key").value);
    refresh();
  });
  $("refresh").addEventListener("click", refresh);
  $("filter").addEventListener("input", drawList);
  $("ask").addEventListener("submit", send);
  $("cancel").addEventListener("click", cancel);
  $("nearest-close").addEventListener("click", () => $("nearest").close());
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !$("nearest").open) cancel();
  });
  refresh();
}

start();
