"use strict";

const RENEW_AFTER = 1000; // milliseconds, while there is nothing to vote on
const element = (id) => document.getElementById(id);
let number = null;

function show(state) {
  number = state.number ?? null;
  element("question").textContent = state.question;
  element("prompt").textContent = number === null ? "" : `Prompt: ${state.prompt}`;
  element("pair").hidden = number === null;
  if (number !== null) {
    for (const side of ["left", "right"]) element(side).querySelector("img").src = state[side];
  }
  const open = number === null ? "the model is generating; more images will come" : `${state.open} to go`;
  element("status").textContent = `${open} · ${state.voted} votes`;
}

async function ask(path, options) {
  try {
    const answer = await fetch(path, options);
    if (!answer.ok && answer.status !== 409) throw new Error(await answer.text());
    show(await answer.json());
  } catch (error) {
    number = null;
    element("pair").hidden = true;
    element("status").textContent = `No answer from the run: ${error.message}`;
  }
}

function vote(winner) {
  if (number === null) return;
  const body = JSON.stringify({ number, winner });
  number = null; // a second press before the answer is no vote on the next pair
  ask("vote", { method: "POST", headers: { "Content-Type": "application/json" }, body });
}

const KEYS = { ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right" };
document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || !(event.key in KEYS)) return;
  event.preventDefault();
  vote(KEYS[event.key]);
});
for (const side of ["left", "right"]) element(side).addEventListener("click", () => vote(side));
setInterval(() => element("pair").hidden && ask("pair"), RENEW_AFTER);
ask("pair");
