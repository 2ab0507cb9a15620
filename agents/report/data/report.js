"use strict";
// Shows the images of the chosen iteration and prompt, and moves the curtain. Text from files is only ever textContent.
(() => {
  const { runs } = JSON.parse(document.getElementById("payload").textContent);
  const slider = document.getElementById("iteration");
  const version = document.documentElement.dataset.version; // only where a server sent the page
  if (slider) showImages();
  for (const button of document.querySelectorAll(".copy")) button.addEventListener("click", () => copy(button));
  if (version) watchForNewer();

  function showImages() {
    const shown = document.getElementById("iteration-shown");
    const play = document.getElementById("play");
    const moments = [...new Set(runs.flatMap((run) => run.iterations))].sort((a, b) => a - b);
    const panels = [...document.querySelectorAll(".panel")]
      .filter((element) => element.querySelector(".curtain"))
      .map((element) => panel(element, runs[element.dataset.run]));
    const state = { moment: moments.length - 1, sample: 0, reveal: 50, follows: true, ...remembered() };
    let timer = 0;

    slider.max = moments.length - 1;
    slider.disabled = moments.length < 2;
    play.disabled = moments.length < 2;
    slider.addEventListener("input", () => {
      pause();
      set({ moment: Number(slider.value) });
    });
    play.addEventListener("click", () => (timer ? pause() : start()));
    for (const one of panels) {
      one.reveal.addEventListener("input", () => set({ reveal: Number(one.reveal.value) }));
      one.radios.forEach((radio, index) => radio.addEventListener("change", () => set({ sample: index })));
    }
    set({ moment: state.follows ? moments.length - 1 : state.moment });

    function set(change) {
      Object.assign(state, change);
      state.moment = Math.min(state.moment, moments.length - 1);
      state.follows = state.moment === moments.length - 1;
      const iteration = moments[state.moment];
      slider.value = state.moment;
      slider.setAttribute("aria-valuetext", `iteration ${iteration}`);
      shown.textContent = iteration;
      for (const one of panels) one.draw(iteration, state);
      for (const cursor of document.querySelectorAll(".cursor")) moveCursor(cursor, iteration);
      if (version) sessionStorage.setItem("report", JSON.stringify(state));
    }

    function start() {
      if (state.moment === moments.length - 1) set({ moment: 0 });
      timer = setInterval(() => {
        set({ moment: state.moment + 1 });
        if (state.moment === moments.length - 1) pause();
      }, 600);
      label(true);
    }

    function pause() {
      clearInterval(timer);
      timer = 0;
      label(false);
    }

    function label(isPlaying) {
      play.setAttribute("aria-pressed", String(isPlaying));
      play.firstElementChild.textContent = isPlaying ? "❚❚" : "▶";
    }
  }

  function panel(element, run) {
    const find = (selector) => element.querySelector(selector);
    const tiles = [...element.querySelectorAll(".tile")];
    const curtain = find(".curtain");
    const reveal = find(".reveal");
    const radios = tiles.map((tile) => tile.querySelector("input"));
    tiles.forEach((tile, index) => (tile.querySelector(".caption").textContent = run.prompts[index]));
    // The range below the curtain is for the keyboard: on phones a finger moves a range only by its small handle.
    curtain.addEventListener("pointerdown", (event) => {
      curtain.setPointerCapture(event.pointerId);
      reveal.focus({ preventScroll: true });
      follow(event);
    });
    curtain.addEventListener("pointermove", (event) => event.buttons && follow(event));

    function follow(event) {
      const { left, width } = curtain.getBoundingClientRect();
      reveal.value = (100 * (event.clientX - left)) / width;
      reveal.dispatchEvent(new Event("input"));
    }

    function draw(iteration, state) {
      // A run without an evaluation at this iteration shows its last one before it.
      const at = Math.max(0, run.iterations.findLastIndex((one) => one <= iteration));
      const sample = Math.min(state.sample, radios.length - 1);
      const now = run.iterations[at];
      radios[sample].checked = true;
      tiles.forEach((tile, index) => drawTile(tile, run.images[at][index], run.notes[at][index], run.prompts[index], now));
      const prompt = run.prompts[sample];
      const moving = run.kind === "video" && run.clips[at].length ? run.clips : run.images;
      drawImage(find(".before"), moving[0][sample], `${prompt}, iteration ${run.iterations[0]}`);
      drawImage(find(".after"), moving[at][sample], `${prompt}, iteration ${now}`);
      find(".tag.left").textContent = run.iterations[0] ? `iteration ${run.iterations[0]}` : "before";
      find(".tag.right").textContent = `iteration ${now}`;
      find(".large .prompt").textContent = prompt;
      reveal.value = state.reveal;
      reveal.setAttribute("aria-valuetext", `${state.reveal} % before training, ${100 - state.reveal} % iteration ${now}`);
      curtain.style.setProperty("--reveal", `${state.reveal}%`);
      drawNotes(find(".notes"), run.notes[0][sample], run.notes[at][sample], now);
      if (run.kind === "audio") drawSounds(find(".clips"), run, at, sample);
    }
    return { draw, reveal, radios };
  }

  function drawTile(tile, source, notes, prompt, iteration) {
    drawImage(tile.querySelector("img"), source, `${prompt}, iteration ${iteration}`);
    tile.querySelector(".score").textContent = notes.length ? `${notes[0][0]} ${notes[0][1]}` : "";
    const said = notes.find(([name]) => /^(.*\/)?answers?$/.test(name));
    tile.querySelector(".answer").textContent = said ? `“${said[1]}”` : "";
  }

  function drawImage(image, source, text) {
    if (image.getAttribute("src") !== source) image.src = source;
    image.alt = text;
  }

  function drawNotes(table, before, now, iteration) {
    table.replaceChildren();
    if (!now.length) return;
    addRow(table.createTHead(), "th", "", "before", `iteration ${iteration}`);
    const body = table.createTBody();
    const known = new Map(before);
    for (const [name, text] of now) addRow(body, "td", name, known.get(name) ?? "–", text);
  }

  function addRow(part, kind, name, ...texts) {
    const row = part.insertRow();
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    row.append(head);
    for (const text of texts) {
      const cell = document.createElement(kind);
      cell.textContent = text;
      row.append(cell);
    }
  }

  function drawSounds(place, run, at, sample) {
    const chosen = [["before", run.clips[0][sample]], [`iteration ${run.iterations[at]}`, run.clips[at][sample]]];
    const shown = `${sample} ${at}`;
    if (place.dataset.shown === shown) return; // a sound that plays goes on
    place.dataset.shown = shown;
    place.replaceChildren();
    for (const [name, source] of chosen.filter(([, one]) => one)) {
      const label = document.createElement("label");
      const sound = document.createElement("audio");
      label.textContent = name;
      sound.controls = true;
      sound.src = source;
      sound.setAttribute("aria-label", `Sound, ${name}`);
      label.append(sound);
      place.append(label);
    }
  }

  function moveCursor(cursor, iteration) {
    const { left, right, end } = cursor.dataset;
    const x = Number(left) + (iteration / Number(end)) * (Number(right) - Number(left));
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
  }

  async function copy(button) {
    const code = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code); // without the clipboard, it is ready for Ctrl-C
      button.textContent = "Selected";
    }
    document.getElementById("announcer").textContent = button.textContent;
  }

  function remembered() {
    try {
      return version ? JSON.parse(sessionStorage.getItem("report")) ?? {} : {};
    } catch {
      return {};
    }
  }

  function watchForNewer() {
    let isHeld = false;
    addEventListener("pointerdown", () => (isHeld = true));
    for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => (isHeld = false));
    setInterval(async () => {
      if (document.hidden || isHeld) return;
      try {
        const answer = await fetch(location.href, { method: "HEAD", cache: "no-store" });
        document.documentElement.classList.remove("offline");
        if (answer.ok && answer.headers.get("ETag") !== `"${version}"`) location.reload();
      } catch {
        document.documentElement.classList.add("offline");
      }
    }, 2000);
  }
})();
