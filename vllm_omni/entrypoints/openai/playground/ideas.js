// Something to begin with, where nothing has been asked yet.
import { button, el } from "./dom.js";
import { set } from "./fields.js";

export const TO_ASK = ["How does a rainbow come about?", "Tell me a joke about a robot.", "Explain tides to a child."];
export const TO_DRAW = [
  "a small red circle above a large blue square on a white background",
  "three yellow stars on a dark blue background",
  "a green tree left of an orange house",
];
export const TO_FILM = ["waves at dusk, seen from a cliff", "a paper boat on a rainy street"];
export const TO_SAY = ["Good morning. The rain has gone, and the sun is out.", "The train to the coast leaves from platform four."];

/** A button for each, which puts it into a field. */
export function ideas(texts, field) {
  const take = (text) => {
    set(field, text);
    field.focus();
  };
  return texts.map((text) => el("li", {}, button(text, () => take(text))));
}
