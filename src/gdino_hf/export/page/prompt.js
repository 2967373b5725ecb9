// From label text to the tokens of prompts, by the rules of gdino_hf.model.text_prompt.

const PERIODS = ".。．｡";
const COMMAS = ",，、､،";
const LINE_BREAKS = "\\n\\r\\v\\f\\x1c-\\x1e\\x85\\u2028\\u2029";
// A decimal point; an abbreviated title or place; single letters joined by periods.
const WORD = "[\\p{L}\\p{N}_]";
const PERIOD_INSIDE =
  `(?<=\\p{Nd})\\.(?=\\p{Nd})|(?<!${WORD})(?:(?:st|mt|dr|mr|mrs|ms|jr|sr)\\.|(?:[a-z]\\.)+[a-z](?!${WORD})\\.?)`;
const LABEL = new RegExp(`(?:${PERIOD_INSIDE}|[^${PERIODS}${COMMAS}${LINE_BREAKS}])+`, "giu");
const CHARACTERS_PER_TOKEN = 16;
const LONGEST_SHOWN = 40;

const shown = (text) => `'${text.length > LONGEST_SHOWN ? `${text.slice(0, LONGEST_SHOWN - 3)}...` : text}'`;
const joined = (words) => words.split(/[\s\u200b\ufeff]+/u).filter(Boolean).join(" ");

/**
 * Split label text at commas, periods and line breaks; "3.5 mm jack", "St. Bernard" and "U.S. flag" are one label each.
 *
 * @param {string} text
 * @returns {string[]} The labels in order, each once.
 */
export function splitLabels(text) {
  return [...new Set((text.match(LABEL) ?? []).map(joined).filter(Boolean))];
}

/**
 * Pack labels into prompts "[CLS] label . label . [SEP]" in their order. A label is never cut.
 *
 * @param {string[]} labels
 * @param {{encode: Function}} tokenizer Tokenizer of @huggingface/tokenizers.
 * @param {Object} text `max_tokens`, and the ids `start`, `end`, `period`, `separators` and `unknown`.
 * @returns {{ids: number[], labels: number[], spans: [number, number][]}[]} Tokens of each prompt, the index of each of
 *   its labels, and where the tokens of each label begin and end.
 */
export function buildPrompts(labels, tokenizer, text) {
  if (labels.length === 0) throw new Error("No label is given; write for instance: cat, remote control.");
  const room = text.max_tokens - 2;
  const phrases = labels.map((label) => phrase(label, tokenizer, text, room));
  const prompts = [];
  for (const [index, tokens] of phrases.entries()) {
    let last = prompts.at(-1);
    if (last === undefined || last.ids.length - 1 + tokens.length > room) {
      last = { ids: [text.start], labels: [], spans: [] };
      prompts.push(last);
    }
    last.labels.push(index);
    last.spans.push([last.ids.length, last.ids.length + tokens.length - 1]);
    last.ids.push(...tokens);
  }
  for (const prompt of prompts) prompt.ids.push(text.end);
  return prompts;
}

function phrase(label, tokenizer, text, room) {
  // These marks end a label inside a prompt.
  const words = joined(label.replace(/[.?]/gu, " "));
  if (words.length > CHARACTERS_PER_TOKEN * text.max_tokens) {
    throw new Error(`The label ${shown(label)} has ${label.length} characters, more than a prompt takes; shorten it.`);
  }
  const { ids, tokens } = tokenizer.encode(words, { add_special_tokens: false });
  const kept = ids.filter((id) => !text.separators.includes(id));
  if (kept.length === 0) throw new Error(`The label ${shown(label)} has nothing to look for in it; use words.`);
  if (kept.length + 1 > room) {
    throw new Error(
      `The label ${shown(label)} has ${kept.length} tokens but a prompt of ${text.max_tokens} takes at most ` +
        `${room - 1}; shorten it.`,
    );
  }
  const known = tokens.filter((_, place) => ids[place] !== text.unknown);
  if (known.length < tokens.length && !known.some((token) => /[\p{L}\p{N}]/u.test(token))) {
    throw new Error(`The tokenizer knows no word of the label ${shown(label)}; use words of the model's language.`);
  }
  return [...kept, text.period];
}
