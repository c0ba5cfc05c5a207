"use strict";
// The table of utterances: searched, sorted, and shown piece by piece.
(() => {
  const { splits, rows } = JSON.parse(document.getElementById("rows").textContent);
  const table = document.getElementById("utterances");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const search = document.getElementById("search");
  const wrong = document.getElementById("wrong");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const PIECE = 50;
  const text = (of) => of[6].map((one) => (typeof one === "string" ? one : one.join(" "))).join(" ");
  const keys = rows.map((of) => [splits[of[0]], of[1], of[2], text(of)].join(" ").toLowerCase());
  const order = new Intl.Collator(undefined, { numeric: true });
  let found = [];
  let shown = 0;
  let sorted = { column: -1, down: false };

  const make = (name, content, kind) => {
    const made = document.createElement(name);
    if (content !== undefined) made.textContent = content;
    if (kind) made.className = kind;
    return made;
  };

  const aligned = (pieces) => {
    const made = make("div", undefined, "aligned");
    made.dir = "auto";
    for (const one of pieces) {
      if (typeof one === "string") {
        made.append(make("span", one), " ");
        continue;
      }
      const kind = !one[0] ? "inserted" : !one[1] ? "deleted" : "substituted";
      const pair = make("span", undefined, "pair " + kind);
      const sign = make("i", { inserted: "+", deleted: "−", substituted: "×" }[kind]);
      sign.title = kind;
      pair.append(make("span", one[0]), sign, make("span", one[1]));
      made.append(pair, " ");
    }
    return made;
  };

  const row = (of) => {
    const made = make("tr");
    of.slice(0, 6).forEach((value, column) => {
      const shown = [splits[value], value, value, value?.toFixed?.(2)][column] ?? value ?? "–";
      const cell = make("td", shown, column > 2 ? "right" : "");
      if (column < 3) cell.dir = "auto";
      made.append(cell);
    });
    const cell = make("td");
    cell.append(aligned(of[6]));
    made.append(cell);
    return made;
  };

  const show = () => {
    const next = found.slice(shown, shown + PIECE);
    body.append(...next.map((place) => row(rows[place])));
    shown += next.length;
    more.hidden = shown >= found.length;
    count.textContent = `${found.length.toLocaleString()} of ${rows.length.toLocaleString()}`;
  };

  const value = (place) => (sorted.column === 6 ? text(rows[place]) : rows[place][sorted.column]);
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    return typeof x === "string" ? order.compare(x, y) : (x ?? -1) - (y ?? -1);
  };

  const find = () => {
    const asked = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    found = [];
    for (let place = 0; place < rows.length; place++) {
      if (wrong.checked && !rows[place][4]) continue;
      if (asked.every((word) => keys[place].includes(word))) found.push(place);
    }
    if (sorted.column >= 0) found.sort((a, b) => (sorted.down ? compare(b, a) : compare(a, b)));
    body.replaceChildren();
    shown = 0;
    show();
  };

  heads.forEach((head, column) => {
    head.firstChild.addEventListener("click", () => {
      // Of numbers the largest are looked for first.
      const down = sorted.column === column ? !sorted.down : column > 2 && column < 6;
      sorted = { column, down };
      heads.forEach((one) => one.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      find();
    });
  });
  let waiting;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(find, 120);
  });
  wrong.addEventListener("change", find);
  more.addEventListener("click", show);
  find();
})();

// Players: a line shows where they are, a click on a word or on the picture goes there.
for (const sound of document.querySelectorAll(".sound")) {
  const player = sound.querySelector("audio");
  const seen = sound.querySelector(".seen");
  const head = sound.querySelector(".head");
  const seconds = Number(sound.dataset.seconds);
  const follow = () => {
    head.style.left = `${(100 * player.currentTime) / seconds}%`;
    if (!player.paused) requestAnimationFrame(follow);
  };
  const go = (at) => {
    const seek = () => { player.currentTime = at; };
    if (player.readyState > 0) seek();
    else player.addEventListener("loadedmetadata", seek, { once: true });
    player.play();
  };
  player.addEventListener("play", () => {
    for (const other of document.querySelectorAll("audio")) if (other !== player) other.pause();
    follow();
  });
  player.addEventListener("seeked", follow);
  seen.addEventListener("click", (event) => {
    const word = event.target.closest("button");
    if (word) return go(Number(word.dataset.at));
    const box = seen.getBoundingClientRect();
    go((seconds * (event.clientX - box.left)) / box.width);
  });
}
