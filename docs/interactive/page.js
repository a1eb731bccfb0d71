// The interactive page: grids of numbers to change, and what refattn makes of them. All arithmetic is Python's, in worker.js.

const root = document.getElementById("interactive");
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
};

// --- one array -------------------------------------------------------------------------------------------------

const short = (x) => (typeof x === "string" ? x : String(Number(x.toPrecision(3))));

function index(shape, flat) {
  const at = [];
  for (const length of [...shape].reverse()) {
    at.unshift(flat % length);
    flat = Math.floor(flat / length);
  }
  return `[${at.join(", ")}]`;
}

// The largest number of an array has the full colour; of weights, 1 has.
function tint(cell, x, top, weights) {
  const share = typeof x === "string" || top === 0 ? 0 : Math.min(Math.abs(x) / top, 1);
  cell.className = weights ? "weight" : x < 0 ? "negative" : "positive";
  cell.style.setProperty("--share", `${(100 * share).toFixed(1)}%`);
}

const largest = (numbers) => Math.max(0, ...numbers.filter(Number.isFinite).map(Math.abs));

// A figure with one table for each pair of its last two axes; fill(cell, flat index) makes a cell.
function figure({ name, axes, shape, numbers }, fill, words = "") {
  const [rows, columns] = [shape.at(-2) ?? 1, shape.at(-1)];
  const tables = [];
  for (let start = 0; start < numbers.length; start += rows * columns) {
    const table = make("table");
    for (let row = 0; row < rows; row += 1) {
      const line = table.insertRow();
      for (let column = 0; column < columns; column += 1) fill(line.insertCell(), start + row * columns + column);
    }
    tables.push(table);
  }
  const letters = axes.length ? `(${axes.join(", ")}) = ` : "";
  const caption = make("figcaption", {}, make("code", {}, name), ` ${letters}(${shape.join(", ")})`);
  if (words) caption.append(make("br"), words);
  return make("figure", { "data-name": name }, caption, make("div", { class: "tables" }, ...tables));
}

// Numbers that may be changed. `changed` is called with all of them.
function editable(grid, changed) {
  const numbers = [...grid.numbers];
  const cells = [];
  const colour = () => cells.forEach((cell, flat) => tint(cell, numbers[flat], largest(numbers), false));
  const shown = figure(grid, (cell, flat) => {
    const input = make("input", {
      type: "number",
      step: 0.1,
      value: numbers[flat],
      "aria-label": `${grid.name}${index(grid.shape, flat)}`,
      oninput: () => {
        const good = Number.isFinite(input.valueAsNumber);
        input.setAttribute("aria-invalid", !good);
        if (!good) return;
        numbers[flat] = input.valueAsNumber;
        colour();
        changed(numbers);
      },
    });
    cells.push(cell);
    cell.append(input);
  });
  colour();
  return shown;
}

function readable(grid, { weights = false, chosen = null } = {}) {
  return figure(grid, (cell, flat) => {
    const x = grid.numbers[flat];
    const where = `${grid.name}${index(grid.shape, flat)}`;
    tint(cell, x, weights ? 1 : largest(grid.numbers), weights);
    cell.dataset.number = x;
    cell.title = `${where} = ${x}`;
    if (chosen) {
      const words = `gradient of ${where}, which is ${short(x)}`;
      cell.append(make("button", { type: "button", "aria-label": words, onclick: () => chosen(flat) }, short(x)));
    } else cell.append(short(x));
  }, chosen ? "choose an entry for its gradient" : "");
}

function ticks(grid, words, changed) {
  const numbers = [...grid.numbers];
  const fill = (cell, flat) => {
    const box = make("input", {
      type: "checkbox",
      checked: numbers[flat],
      "aria-label": `${grid.name}${index(grid.shape, flat)}`,
      onchange: () => {
        numbers[flat] = box.checked;
        changed(numbers);
      },
    });
    cell.append(box);
  };
  return figure(grid, fill, words);
}

// --- the call and its answer -----------------------------------------------------------------------------------

const status = make("p", { role: "status" });
const chooser = make("select", { "aria-label": "mechanism", onchange: () => begin(chooser.value) });
const restart = make("button", { type: "button", onclick: () => begin(chooser.value) }, "Start values");
const parts = Object.fromEntries(
  ["args", "options", "forward", "cotangent", "grads", "check"].map((name) => [name, make("div", { class: name })]),
);
const code = make("code");
const source = make("a");
const body = make(
  "div",
  { hidden: true },
  make("p", { class: "choice" }, chooser, " ", restart, " ", source),
  make("h2", {}, "Arguments"),
  parts.args,
  parts.options,
  make("h2", {}, "Forward"),
  parts.forward,
  make("h2", {}, "Backward"),
  parts.cotangent,
  parts.grads,
  parts.check,
  make("details", {}, make("summary", {}, "The same call in Python"), make("pre", {}, code)),
);
root.replaceChildren(status, body);

let call; // what is asked: {name, arrays, options, cotangent}
let fresh; // the next answer is of a call that starts anew: its inputs are drawn too
let asked = 0; // calls sent so far
let answered = 0;
let again = false; // something changed while Python was at work
let focused = null; // the entry of the output that was chosen, whose button is about to be drawn anew

function begin(name) {
  call = { name };
  fresh = true;
  body.inert = true;
  ask();
}

function ask() {
  again = answered < asked;
  if (again) return;
  asked += 1;
  body.setAttribute("aria-busy", true);
  worker.postMessage({ id: asked, text: JSON.stringify(call) });
}

function drawInputs(answer) {
  call.arrays = answer.args.map((grid) => grid.numbers);
  call.options = Object.fromEntries(
    answer.options.map(({ name, kind, value }) => [name, kind === "ticks" ? value.numbers : value]),
  );
  parts.args.replaceChildren(
    ...answer.args.map((grid, i) =>
      editable(grid, (numbers) => {
        call.arrays[i] = numbers;
        ask();
      }),
    ),
  );
  const drawn = answer.options.map(drawOption);
  const knobs = make("div", { class: "knobs" }, ...drawn.filter((option) => option.tagName === "LABEL"));
  parts.options.replaceChildren(knobs, ...drawn.filter((option) => option.tagName !== "LABEL"));
  parts.options.hidden = drawn.length === 0;
  drawCotangent(answer.cotangent);
  source.href = `../reference/${answer.page}.html`;
  source.textContent = "its page, with derivation and code";
}

function drawOption({ name, words, kind, value, range }) {
  const changed = (now) => {
    call.options[name] = now;
    ask();
  };
  if (kind === "ticks") return ticks(value, words, changed);
  if (kind === "switch") {
    const box = make("input", { type: "checkbox", name, checked: value, onchange: () => changed(box.checked) });
    return make("label", {}, box, " ", make("code", {}, name), ` ${words}`);
  }
  const [min, max, step] = range;
  const shown = make("output", {}, String(value));
  const slide = make("input", { type: "range", name, min, max, step, value });
  slide.addEventListener("input", () => {
    shown.textContent = slide.value;
    changed(slide.valueAsNumber);
  });
  return make("label", {}, make("code", {}, name), ` ${words} `, slide, " ", shown);
}

function drawCotangent(grid) {
  call.cotangent = grid.numbers;
  parts.cotangent.replaceChildren(
    editable(grid, (numbers) => {
      call.cotangent = numbers;
      ask();
    }),
  );
}

function drawAnswer(answer) {
  const chosen = (flat) => {
    focused = flat;
    drawCotangent({ ...answer.cotangent, numbers: answer.cotangent.numbers.map((_, i) => Number(i === flat)) });
    ask();
  };
  const [left, right] = answer.check;
  const name = answer.out.name;
  const itself = answer.weights.name === name; // of a softmax the output is the weights
  parts.forward.replaceChildren(readable(answer.out, { chosen, weights: itself }));
  if (!itself) parts.forward.prepend(readable(answer.weights, { weights: true }));
  if (focused !== null) parts.forward.querySelectorAll("button")[focused].focus({ preventScroll: true });
  focused = null;
  parts.grads.replaceChildren(...answer.grads.map((grid) => readable(grid)));
  parts.check.replaceChildren(
    `For a direction v of random numbers: ⟨d${name}, J v⟩ = ${left}, by the complex step through forward, and ` +
      `⟨J' d${name}, v⟩ = ${right}, from the gradients above.`,
  );
  code.textContent = answer.code;
}

// --- Python ----------------------------------------------------------------------------------------------------

function say(words, failed = false) {
  status.textContent = words;
  status.classList.toggle("failed", failed);
  status.hidden = !words;
}

function heard({ data }) {
  if (data.broken !== undefined) return say(data.broken, true);
  if (data.status !== undefined) return say(`${data.status} …`);
  if (data.menu !== undefined) {
    chooser.replaceChildren(...data.menu.map(([name, words]) => make("option", { value: name }, words)));
    return begin(data.menu[0][0]);
  }
  answered = data.id;
  body.setAttribute("aria-busy", false);
  body.classList.toggle("stale", data.error !== undefined);
  if (data.error !== undefined) say(data.error, true);
  else {
    const answer = JSON.parse(data.text);
    if (fresh && !again) {
      drawInputs(answer);
      fresh = false;
      body.inert = false;
    }
    drawAnswer(answer);
    body.hidden = false;
    say("");
  }
  if (again) ask();
}

say("Loading Python …");
const worker = new Worker(new URL("worker.js", import.meta.url));
worker.onmessage = heard;
worker.onerror = (event) => say(event.message || "Python could not be loaded.", true);
