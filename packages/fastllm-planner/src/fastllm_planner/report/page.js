"use strict";
// Everything on the page reads without this script; it adds copying and choosing between plans.
(function () {
  const status = document.getElementById("status");
  function say(words) {
    status.textContent = words;
    window.setTimeout(() => { status.textContent = ""; }, 2500);
  }
  function copyByHand(text) {
    // The clipboard API needs https or localhost; a file:// page falls back to a selection.
    const area = document.createElement("textarea");
    area.value = text;
    document.body.appendChild(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      say("Copied.");
    } catch (error) {
      say(copyByHand(text) ? "Copied." : "Copying is not allowed here: select the text instead.");
    }
  }
  function show(rank, focus) {
    for (const section of document.querySelectorAll("section.plan")) {
      section.hidden = section.dataset.rank !== rank;
    }
    for (const row of document.querySelectorAll("tr[data-rank]")) {
      const chosen = row.dataset.rank === rank;
      row.classList.toggle("chosen", chosen);
      row.querySelector("button.show").setAttribute("aria-pressed", String(chosen));
    }
    if (focus) { document.getElementById("pictures").focus(); }
  }
  for (const button of document.querySelectorAll("button.copy")) {
    button.addEventListener("click", () => {
      copy(document.getElementById(button.dataset.from).textContent);
    });
  }
  for (const button of document.querySelectorAll("button.show")) {
    button.addEventListener("click", () => show(button.closest("tr").dataset.rank, true));
  }
  if (document.querySelector("section.plan")) { show("1", false); }
  document.documentElement.dataset.ready = "yes";
})();
