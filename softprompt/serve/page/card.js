// One answer: a card that asks, shows the text as it comes, and what it cost. Text of the server is only ever text.

import { answer } from "./api.js";

const NONE = "–";

export class Card {
  /** A card for `model` ({id, about, length}); `changed` is called whenever it starts, gets on or ends. */
  constructor(model, changed) {
    this.changed = changed;
    this.node = document.getElementById("card").content.firstElementChild.cloneNode(true);
    const named = [...this.node.querySelectorAll("[data-part]")];
    this.parts = Object.fromEntries(named.map((part) => [part.dataset.part, part]));
    this.node.dataset.state = "new"; // new, running, done, cancelled, failed
    this.parts.stop.addEventListener("click", () => this.stop());
    this.first = this.total = 0; // milliseconds since the request was sent
    this.know(model);
  }

  /** What is known of the model now: its prompt may have been replaced. */
  know(model) {
    this.model = model;
    this.node.setAttribute("aria-label", model.id);
    this.parts.name.textContent = model.id;
    this.parts.about.textContent = model.about;
  }

  get running() {
    return this.node.dataset.state === "running";
  }

  stop() {
    this.control?.abort();
  }

  /** Ask and show the answer, whatever becomes of it; never throws. `ask`: text, chat, settings and key. */
  async run(ask) {
    this.begin();
    const signal = this.control.signal;
    try {
      for await (const piece of answer({ ...ask, model: this.model.id, signal })) this.take(piece);
      this.end("done");
    } catch (error) {
      if (error.name === "AbortError") this.end("cancelled");
      else this.fail(error.message);
    }
  }

  begin() {
    this.control = new AbortController();
    this.sent = performance.now();
    this.first = this.last = this.total = this.pieces = 0;
    for (const part of ["first", "speed", "all", "real", "virtual", "end"]) this.parts[part].textContent = NONE;
    this.parts.text.textContent = "";
    this.parts.error.hidden = true;
    this.move("running");
  }

  take({ text, finish, usage }) {
    this.total = performance.now() - this.sent;
    if (text) {
      this.first ||= this.total;
      this.last = this.total;
      this.pieces += 1;
      this.parts.text.append(text); // a string: a text node
      this.parts.first.textContent = milliseconds(this.first);
    }
    if (finish) this.parts.end.textContent = finish;
    if (usage) this.count(usage);
    this.changed();
  }

  count(usage) {
    const answered = usage.completion_tokens;
    this.parts.real.textContent = `${number(usage.prompt_tokens)} + ${number(answered)}`;
    this.parts.real.title = `${number(usage.prompt_tokens)} of the text, ${number(answered)} of the answer`;
    const virtual = usage.prompt_tokens_details?.virtual_tokens ?? this.model.length; // vLLM's usage has no such field
    this.parts.virtual.textContent = virtual === null ? NONE : number(virtual);
    const seconds = (this.last - this.first) / 1000;
    const several = this.pieces > 1 && answered > 1 && seconds > 0; // one piece says nothing about the time between
    this.parts.speed.textContent = several ? `${number((answered - 1) / seconds)} tokens/s` : NONE;
  }

  end(state) {
    this.total = performance.now() - this.sent;
    this.parts.all.textContent = milliseconds(this.total);
    if (state === "cancelled") this.parts.end.textContent = "cancelled";
    this.move(state);
  }

  fail(message) {
    this.parts.error.textContent = message;
    this.parts.error.hidden = false;
    this.parts.end.textContent = "error";
    this.end("failed");
  }

  move(state) {
    this.node.dataset.state = state;
    this.node.setAttribute("aria-busy", String(state === "running"));
    this.parts.stop.hidden = state !== "running";
    this.changed();
  }

  /** The bar of its times: waiting, then flowing, of `longest` milliseconds. */
  draw(longest) {
    const first = this.first || this.total;
    this.parts.wait.style.width = `${(100 * first) / longest}%`;
    this.parts.flow.style.width = `${(100 * (this.total - first)) / longest}%`;
  }
}

export function number(value) {
  const digits = value < 100 && !Number.isInteger(value) ? 1 : 0;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function milliseconds(value) {
  return value < 10_000 ? `${number(Math.round(value))} ms` : `${number(value / 1000)} s`;
}
