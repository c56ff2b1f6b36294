// The page: a search, its hits, a player with a curve, and what can be asked of a video.

const $ = (id) => document.getElementById(id);
const hits = $("hits"), video = $("video"), plot = $("plot");
const SVG = "http://www.w3.org/2000/svg";

/** What the player shows: a hit of the index, or a file of the user's. */
let shown = null;
/** Words that the curve is of. */
let words = "";
let curve = null;
/** Answers that come after a newer question are left aside. */
let latest = 0;

function clock(seconds) {
  const minutes = Math.floor(seconds / 60);
  return `${minutes}:${(seconds - 60 * minutes).toFixed(1).padStart(4, "0")}`;
}

/** JSON of the API, or an Error with its own words. */
async function ask(path, parameters = {}, file = null) {
  const url = new URL(path, location.href);
  for (const [name, value] of Object.entries(parameters)) url.searchParams.set(name, value);
  const how = file && { method: "POST", body: file, headers: { "Content-Type": file.type || "application/octet-stream" } };
  let answer;
  try {
    answer = await fetch(url, how || {});
  } catch {
    throw new Error("the server does not answer; is it still running?");
  }
  const content = await answer.json().catch(() => ({ detail: `the server says ${answer.status}` }));
  if (!answer.ok) throw new Error(content.detail);
  return content;
}

/** Runs `work` with words in a line of status; an error takes their place. */
async function told(line, waiting, work) {
  line.classList.remove("error");
  line.textContent = waiting;
  try {
    line.textContent = (await work()) ?? "";
  } catch (error) {
    line.classList.add("error");
    line.textContent = error.message;
  }
}

function card(hit) {
  const item = document.createElement("li"), button = document.createElement("button");
  button.type = "button";
  const image = document.createElement("img");
  image.src = hit.thumbnail;
  image.alt = "";
  image.loading = "lazy";
  const time = document.createElement("span"), path = document.createElement("span");
  time.className = "time";
  time.textContent = `${clock(hit.start)} – ${clock(hit.end)}  ·  ${hit.score.toFixed(3)}`;
  path.className = "path";
  path.textContent = hit.path; // text, never markup: names are the user's
  button.append(image, time, path);
  button.addEventListener("click", () => play(hit, button));
  item.append(button);
  return item;
}

async function search(path, parameters, file, done) {
  const mine = ++latest;
  await told($("status"), "Searching …", async () => {
    const found = await ask(path, { ...parameters, top: 24 }, file);
    if (mine !== latest) return $("status").textContent;
    hits.replaceChildren(...found.hits.map(card));
    return found.hits.length ? done(found.hits.length) : "Nothing is indexed.";
  });
}

function play(hit, button) {
  shown = { hit, part: [hit.at, hit.at + hit.end - hit.start] };
  for (const other of hits.querySelectorAll("[aria-current]")) other.removeAttribute("aria-current");
  button.setAttribute("aria-current", "true");
  open(hit.path, `${hit.video}#t=${hit.at}`);
}

function open(title, source) {
  $("player").hidden = false;
  $("playing").textContent = title;
  $("said").textContent = "";
  video.src = source;
  video.play().catch(() => {}); // where a browser wants a click first
  $("player").scrollIntoView({ block: "nearest" });
  drawCurve();
}

function close() {
  video.pause();
  video.removeAttribute("src");
  video.load();
  $("player").hidden = true;
  const current = hits.querySelector("[aria-current]");
  current?.removeAttribute("aria-current");
  (current || $("query")).focus();
}

/** Of the shown video and the words searched for. */
async function drawCurve() {
  const of = shown;
  curve = null;
  $("curve").hidden = true;
  if (!words) return;
  try {
    const found = of.file
      ? await ask("api/curve", { query: words }, of.file)
      : await ask(`api/windows/${of.hit.window}/curve`, { query: words });
    if (of !== shown) return;
    // an excerpt's time begins with its part
    const shift = of.hit ? of.hit.start - of.hit.at : 0;
    curve = { seconds: found.seconds.map((second) => second - shift), similarity: found.similarity };
    $("curve").hidden = false;
    $("legend").textContent = `How well “${words}” fits each moment`;
    redraw();
  } catch {
    // a curve is an extra
  }
}

function redraw() {
  if (!curve || !video.duration) return;
  const { seconds, similarity } = curve, length = video.duration;
  const low = Math.min(...similarity), high = Math.max(...similarity);
  const x = (second) => (600 * second) / length;
  const y = (value) => 80 - (70 * (value - low)) / (high - low || 1);
  const shape = (name, attributes) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const line = shape("polyline", { class: "fit", points: seconds.map((s, i) => `${x(s)},${y(similarity[i])}`).join(" ") });
  const parts = [];
  if (shown.part) {
    const [start, end] = shown.part;
    parts.push(shape("rect", { class: "part", x: x(start), width: x(Math.min(end, length) - start), y: 0, height: 90 }));
  }
  const now = shape("line", { class: "now", id: "now", y1: 0, y2: 90 });
  plot.replaceChildren(...parts, line, now);
  plot.setAttribute("aria-valuemin", 0);
  plot.setAttribute("aria-valuemax", length.toFixed(1));
  moved();
}

function moved() {
  const now = $("now");
  if (!now || !video.duration) return;
  const x = (600 * video.currentTime) / video.duration;
  now.setAttribute("x1", x);
  now.setAttribute("x2", x);
  plot.setAttribute("aria-valuenow", video.currentTime.toFixed(1));
  plot.setAttribute("aria-valuetext", clock(video.currentTime));
}

function take(file) {
  if (!file) return;
  if (shown?.url) URL.revokeObjectURL(shown.url);
  shown = { file, url: URL.createObjectURL(file) };
  open(file.name, shown.url);
  search("api/search/video", {}, file, (count) => `${count} moments that look like ${file.name}`);
}

/** What a task says of what is shown. */
async function predict(task, parameters) {
  const path = `predict/${encodeURIComponent(task)}`;
  const { predictions } = await (shown.file
    ? ask(`api/${path}`, parameters, shown.file)
    : ask(`api/windows/${shown.hit.window}/${path}`, parameters));
  return predictions
    .map(({ text, probability }) => (probability === null ? `“${text}”` : `${text} (${Math.round(100 * probability)}%)`))
    .join(", ");
}

/** A task's button, with a line for the question where it is asked one. */
function offered({ task, button, description, question }, all) {
  const press = document.createElement("button");
  // two tasks that offer the same are told apart by their names
  press.textContent = all.filter((other) => other.button === button).length > 1 ? `${button} (${task})` : button;
  press.title = description;
  if (question === null) {
    press.type = "button";
    press.addEventListener("click", () => told($("said"), "Looking …", () => predict(task, {})));
    press.dataset.task = task;
    return press;
  }
  const form = document.createElement("form"), input = document.createElement("input");
  form.dataset.task = task;
  input.maxLength = 500;
  input.autocomplete = "off";
  input.placeholder = question;
  input.setAttribute("aria-label", `A question about the video: ${description}`);
  press.type = "submit";
  form.append(input, press);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const asked = input.value.trim();
    if (asked) told($("said"), "Thinking …", () => predict(task, { question: asked }));
  });
  return form;
}

$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  words = $("query").value.trim();
  if (!words) return;
  search("api/search", { query: words }, null, (count) => `${count} moments for “${words}”`);
  if (shown && !$("player").hidden) drawCurve();
});

$("similar").addEventListener("click", async () => {
  if (shown.file) return take(shown.file);
  const { hit } = shown;
  await told($("status"), "Searching …", async () => {
    const found = await ask(`api/windows/${hit.window}/similar`, { top: 24 });
    hits.replaceChildren(...found.hits.map(card));
    return `${found.hits.length} moments that look like ${hit.path} at ${clock(hit.start)}`;
  });
});

$("close").addEventListener("click", close);
$("file").addEventListener("change", (event) => take(event.target.files[0]));
video.addEventListener("loadedmetadata", redraw);
video.addEventListener("timeupdate", moved);
video.addEventListener("error", () => {
  if (video.getAttribute("src")) $("said").textContent = "this browser cannot play the file; it can still be asked about";
});

function seek(second) {
  if (video.duration) video.currentTime = Math.min(Math.max(0, second), video.duration);
}

plot.addEventListener("pointerdown", (event) => {
  const box = plot.getBoundingClientRect();
  seek((video.duration * (event.clientX - box.left)) / box.width);
});

plot.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  event.preventDefault();
  seek(video.currentTime + step);
});

for (const name of ["dragenter", "dragover"]) {
  addEventListener(name, (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
}
for (const name of ["dragleave", "drop"]) {
  addEventListener(name, (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
  });
}
addEventListener("drop", (event) => take(event.dataTransfer.files[0]));

addEventListener("keydown", (event) => {
  const typing = event.target.matches("input");
  if (event.key === "Escape" && !$("player").hidden) close();
  if (event.key === "/" && !typing) {
    event.preventDefault();
    $("query").focus();
  }
  const all = [...hits.querySelectorAll("button")], at = all.indexOf(document.activeElement);
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (step && at >= 0) {
    event.preventDefault();
    all[Math.min(Math.max(0, at + step), all.length - 1)].focus();
  }
});

const facts = await ask("api/facts").catch((error) => ({ offers: [], error }));
$("offers").replaceChildren(...facts.offers.map((offer) => offered(offer, facts.offers)));
$("facts").textContent = facts.error ? facts.error.message : `${facts.windows.toLocaleString("en")} moments indexed`;
