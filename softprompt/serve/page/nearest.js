// What a prompt is close to: for each virtual token the words whose embeddings are nearest, in a dialog.

import { get, promptPath } from "./api.js";
import { number } from "./card.js";

const $ = (id) => document.getElementById(id);
const HINT =
  "The words whose embeddings are closest to each virtual token, with their cosine. " +
  "A trained vector need not be close to any word.";

/** Open the dialog for the prompt `name`; what the server refuses is shown in it. */
export async function showNearest(name, key) {
  $("nearest-title").textContent = name;
  $("nearest-note").textContent = "Looking…";
  $("nearest-tokens").replaceChildren();
  $("nearest").showModal();
  try {
    const found = await get(promptPath(name, "nearest"), key);
    if ($("nearest-title").textContent !== name) return; // another one was opened meanwhile
    $("nearest-tokens").replaceChildren(...found.tokens.map(virtualToken));
    $("nearest-note").textContent = `${number(found.tokens.length)} virtual tokens. ${HINT}`;
  } catch (error) {
    $("nearest-note").textContent = error.message;
  }
}

function virtualToken(words, place) {
  const item = document.createElement("li");
  item.append(part("small", `virtual token ${place + 1}`));
  for (const [word, cosine] of words) {
    const line = document.createElement("div");
    line.append(part("code", visible(word)), part("span", cosine.toFixed(2)));
    item.append(line);
  }
  return item;
}

function part(tag, text) {
  const node = document.createElement(tag);
  node.textContent = text;
  return node;
}

/** A token's text with what cannot be seen made visible, as in the report of a run. */
function visible(token) {
  const shown = token.replaceAll("\n", "⏎").replace(/^ +| +$/g, "");
  return shown.trim() ? shown : "␣";
}
