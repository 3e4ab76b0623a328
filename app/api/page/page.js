// The page: shows what the fleet knows, and goes on asking. Whatever comes from elsewhere is set as text, never as markup.

import { condition, Fleet, isLive } from "./fleet.js";
import { ask, events, pages, pieces, read, Refused, token } from "./service.js";

const ROWS = 100; // runners on a page of the list
const RENDER_MS = 120; // at most so often, however much happens
const POOLS_MS = 1_000; // pools are read anew so soon after an event
const ENGINES_MS = 15_000; // and with the engines so often without one
const CHECK_MS = 60_000; // and a page of the list so often, for what the service has forgotten
const HIDDEN_MS = 30_000; // a tab that nobody sees lets go of its streams: browsers allow few to one service
const LOG_LINES = 2_000;
const LOG_CHARACTERS = 600_000;

const $ = (id) => document.getElementById(id);
const fleet = new Fleet();
const page = {
  at: { id: null, state: "", pool: "", words: [], query: "" },
  first: 0, // the first row shown
  older: null, // the cursor behind the oldest runner of the plain list
  checked: null, // where the list was checked last: {cursor, until}; null: at its end
  loaded: false,
  pools: [],
  engines: [],
  connection: null, // aborts the stream, and all that was asked meanwhile
  revision: null,
  wake: () => {},
};
let opened = null; // the runner in detail: {id, record, abort, ...}

// Words.

const clock = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const hours = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
const plural = (count, one, many = `${one}s`) => `${count.toLocaleString()} ${count === 1 ? one : many}`;
const spaced = (word) => (word === "oom_killed" ? "out of memory" : (word ?? "").replaceAll("_", " "));
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function span(milliseconds) {
  const seconds = Math.max(0, milliseconds / 1000);
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  return whole(seconds);
}

function whole(seconds) {
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86_400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86_400)} d`;
}

function when(runner) {
  const since = (moment) => Math.max(0, (Date.now() - Date.parse(moment)) / 1000);
  return isLive(runner) ? `for ${whole(since(runner.started_at ?? runner.created_at))}` : `${whole(since(runner.finished_at))} ago`;
}

function words(runner) {
  const said = isLive(runner) ? runner.message : [spaced(runner.reason), runner.message].filter(Boolean).join(": ");
  return capital([isStale(runner) && "may be out of date, its engine does not answer", said].filter(Boolean).join("; "));
}

function isStale(runner) {
  if (!isLive(runner)) return false;
  const engine = page.engines.find((each) => each.pools.includes(runner.pool_name));
  return engine ? !engine.answers : Boolean(runner.stale);
}

// Elements.

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function text(target, words) {
  if (target.textContent !== words) target.textContent = words;
}

function show(target, shown) {
  target.hidden = !shown;
}

function complain(target, error) {
  text(target, error ? (error instanceof Refused ? `${capital(error.message)}.` : "The service cannot be reached. Try again.") : "");
  show(target, Boolean(error));
}

// Where we are: #/runners/ID?state=failed&pool=gpu&q=words

function locate() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const asked = new URLSearchParams(query);
  const [kind, id] = path.split("/");
  const before = page.at;
  page.at = {
    id: kind === "runners" && id ? decode(id) : null,
    state: asked.get("state") ?? "",
    pool: asked.get("pool") ?? "",
    query: asked.get("q") ?? "",
    words: (asked.get("q") ?? "").toLowerCase().split(/\s+/).filter(Boolean),
  };
  if (filtered() !== filtered(before)) page.first = 0;
  const chosen = document.querySelector(`input[name=state][value="${CSS.escape(page.at.state)}"]`);
  if (chosen) chosen.checked = true;
  if ($("query") !== document.activeElement) $("query").value = page.at.query;
  $("back").href = address({ id: null });
  if (page.loaded) open(page.at.id);
  render();
}

function decode(id) {
  try {
    return decodeURIComponent(id);
  } catch {
    return id;
  }
}

const filtered = (at = page.at) => JSON.stringify([at.state, at.pool, at.query]);

function address(change) {
  const at = { ...page.at, ...change };
  const query = new URLSearchParams(Object.entries({ state: at.state, pool: at.pool, q: at.query }).filter(([, value]) => value));
  return `#/${at.id ? `runners/${encodeURIComponent(at.id)}` : ""}${query.size ? `?${query}` : ""}`;
}

function go(change) {
  history.replaceState(null, "", address(change));
  locate();
}

// The connection: a stream of events, taken up again where it broke.

async function connect() {
  let failures = 0;
  while (page.connection) {
    const connection = (page.connection = new AbortController());
    let problem = null;
    let farewell = "";
    const loading = { error: null };
    try {
      for await (const batch of events(page.revision, connection.signal)) {
        for (const told of batch) {
          if (told.name === "bye") farewell = JSON.parse(told.data).detail;
          if (told.name === "hello") {
            failures = 0;
            const fresh = page.revision === null;
            if (!fresh) connected("live", "Live");
            (fresh ? load(connection.signal) : refresh(connection.signal)).catch((error) => {
              loading.error = error;
              connection.abort();
            });
          }
          if (told.name === "message") happened(JSON.parse(told.data));
          if (told.id !== null) page.revision = told.id;
        }
      }
    } catch (error) {
      problem = loading.error ?? error;
    }
    if (loading.error && !page.loaded) page.revision = null;
    if (!page.connection) return;
    if (problem instanceof Refused && [401, 403].includes(problem.status)) return leave(problem);
    if (problem instanceof Refused && problem.status === 410) {
      forget();
      connected("busy", "Reading everything anew…");
      continue;
    }
    if (document.hidden) {
      connected("off", "Paused while nobody looks");
      await new Promise((resolve) => (page.wake = resolve));
      continue;
    }
    failures += 1;
    await pause(farewell || (problem instanceof Refused ? problem.message : "The service cannot be reached"), failures);
  }
}

async function pause(why, failures) {
  const patience = Math.min(30_000, 500 * 2 ** failures) * (0.75 + Math.random() / 2);
  const until = Date.now() + patience;
  const say = () => {
    connected("lost", "Not connected");
    const rest = Math.max(1, Math.ceil((until - Date.now()) / 1000));
    notice("connection", failures > 1 || patience > 2000 ? `${capital(why)}. What you see may be out of date. Trying again in ${rest} s.` : `${capital(why)}. Trying again.`);
  };
  say();
  const telling = setInterval(say, 1000);
  await new Promise((resolve) => {
    page.wake = resolve;
    setTimeout(resolve, patience);
  });
  clearInterval(telling);
  if (page.connection) connected("busy", "Connecting…");
}

function connected(state, words) {
  $("connection").dataset.state = state;
  text($("connection"), words);
  if (state === "live") notice();
}

function notice(kind = "", words = "") {
  const away = page.engines.filter((engine) => !engine.answers);
  if (!kind && away.length) {
    kind = "engine";
    words = away.map(({ name, problem }) => `${name} does not answer${problem ? `: ${problem}` : ""}. Its runners most likely go on.`).join(" ");
  }
  $("notice").dataset.kind = kind;
  text($("notice-text"), words);
  show($("notice"), kind);
}

async function load(signal) {
  connected("busy", "Reading runners…");
  await refresh(signal);
  const newest = await read("runners?limit=500", { signal });
  newest.items.forEach((record) => fleet.put(record));
  page.older = newest.next_cursor;
  for (const state of newest.next_cursor ? ["running", "pending"] : [])
    for await (const { items } of pages({ state }, signal)) {
      items.forEach((record) => fleet.put(record));
      render();
    }
  page.loaded = true;
  connected("live", "Live");
  open(page.at.id);
  render();
}

async function refresh(signal) {
  [page.pools, page.engines] = (await Promise.all([read("pools", { signal }), read("engines", { signal })])).map((answer) => answer.items);
  if ($("notice").dataset.kind !== "connection" || $("connection").dataset.state === "live") notice();
  renderPools();
  render();
}

let refreshing = 0;
function refreshSoon() {
  refreshing ||= setTimeout(async () => {
    await refresh(page.connection?.signal).catch(() => {}); // the stream tells when the service is away
    refreshing = 0;
  }, POOLS_MS);
}

function happened(event) {
  fleet.tell(event);
  if (opened?.id === event.runner_id) lookAgain();
  if (event.to === "finished" && opened?.id === event.runner_id)
    text($("said"), `${event.runner_id} ${event.reason ? `failed: ${spaced(event.reason)}` : "completed"}`);
  refreshSoon();
  render();
}

function forget() {
  fleet.clear();
  Object.assign(page, { revision: null, loaded: false, older: null, checked: null, first: 0 });
}

let checking = false;
/** Find those of whom the service has nothing any more: no event says so. A page of the list at a time, then the next. */
async function check() {
  if (checking || !page.loaded || document.hidden) return;
  checking = true;
  try {
    const { signal } = page.connection;
    const { cursor, until } = page.checked ?? { until: "~" };
    const ended = fleet.all().filter((runner) => !isLive(runner));
    const { items, next_cursor } = await read(`runners?${new URLSearchParams({ limit: 500, ...(cursor && { cursor }) })}`, { signal });
    const there = new Set(items.map((record) => record.runner_id));
    const from = next_cursor ? items.at(-1).created_at : "";
    const missing = ended.filter(({ runner_id, created_at }) => !there.has(runner_id) && from <= created_at && created_at <= until);
    for (const { runner_id } of missing) await renew(runner_id, signal);
    page.checked = from && ended.at(-1)?.created_at < from ? { cursor: next_cursor, until: from } : null;
  } catch {
    // the stream tells when the service is away
  } finally {
    checking = false;
  }
}

/** Read a runner anew, and forget it if there is none. */
async function renew(id, signal) {
  try {
    fleet.put(await read(`runners/${id}`, { signal }));
  } catch (error) {
    if (!(error instanceof Refused && error.status === 404)) throw error;
    fleet.drop(id);
  }
  render();
}

// The list.

let rendering = 0;
let rendered = 0;
function render() {
  rendering ||= setTimeout(
    () =>
      requestAnimationFrame(() => {
        rendering = 0;
        rendered = performance.now();
        renderList();
      }),
    Math.max(0, RENDER_MS - (performance.now() - rendered)),
  );
}

function renderList() {
  const found = fleet.find(page.at);
  page.first = Math.min(page.first, Math.max(0, Math.ceil(found.length / ROWS) - 1) * ROWS);
  const shown = found.slice(page.first, page.first + ROWS);
  place(shown);
  markPool();
  text($("count-live"), page.loaded ? fleet.live.toLocaleString() : "");
  document.title = page.loaded ? `${fleet.live} live · Runner Launcher` : "Runner Launcher";
  const few = found.length <= ROWS;
  text($("range"), few ? plural(found.length, "runner") : `${(page.first + 1).toLocaleString()}–${(page.first + shown.length).toLocaleString()} of ${plural(found.length, "runner")}`);
  show($("previous"), !few);
  show($("next"), !few);
  $("previous").disabled = page.first === 0;
  $("next").disabled = page.first + ROWS >= found.length;
  show($("older"), page.older && page.first + ROWS >= found.length);
  renderEmpty(found.length === 0);
  complete(shown);
}

function renderEmpty(empty) {
  show($("empty"), empty);
  $("list").classList.toggle("bare", empty && !page.older);
  show($("rows"), !empty);
  if (!empty) return;
  const filter = page.at.state || page.at.pool || page.at.query;
  const words = !page.loaded ? "Reading runners…" : filter ? "No runner matches the filter." : "No runners yet. A launch appears here as it happens.";
  text($("empty-text"), words);
  show($("clear"), filter && page.loaded);
}

const rows = new Map(); // runner id: its row
function place(shown) {
  const wanted = new Set(shown.map((runner) => runner.runner_id));
  for (const [id, row] of rows)
    if (!wanted.has(id)) {
      row.item.remove();
      rows.delete(id);
    }
  let next = $("rows").firstElementChild;
  for (const runner of shown) {
    const row = rows.get(runner.runner_id) ?? makeRow(runner);
    fill(row, runner);
    if (row.item === next) next = next.nextElementSibling;
    else $("rows").insertBefore(row.item, next);
  }
}

function makeRow(runner) {
  const parts = ["state", "task", "words", "pool-name", "slot", "when"].map((name) => element("span", { className: name }));
  const [state, task, said, pool, slot, age] = parts;
  const link = element("a", { className: "row" }, state, task, pool, slot, age, said);
  const row = { item: element("li", {}, link), link, state, task, said, pool, slot, age };
  rows.set(runner.runner_id, row);
  return row;
}

function fill(row, runner) {
  const is = condition(runner);
  const href = address({ id: runner.runner_id });
  if (row.link.getAttribute("href") !== href) row.link.setAttribute("href", href);
  row.state.dataset.state = is;
  text(row.state, capital(is));
  text(row.task, runner.task_id);
  text(row.pool, runner.pool_name);
  text(row.slot, runner.slot_id);
  text(row.age, when(runner));
  text(row.said, words(runner));
  row.link.classList.toggle("stale", isStale(runner));
  if (opened?.id === runner.runner_id) row.link.setAttribute("aria-current", "true");
  else row.link.removeAttribute("aria-current");
}

const asking = new Set();
/** Read what events do not say of runners that are seen. */
function complete(shown) {
  for (const { runner_id: id } of shown.filter((runner) => runner.partial && !runner.slot_id)) {
    if (asking.size >= 4) return;
    if (asking.has(id)) continue;
    asking.add(id);
    renew(id, page.connection?.signal)
      .catch(() => {})
      .finally(() => asking.delete(id));
  }
}

// Pools.

function renderPools() {
  show($("no-pools"), page.pools.length === 0);
  const known = new Map([...$("pools").children].map((item) => [item.dataset.pool, item]));
  for (const pool of page.pools) {
    const item = known.get(pool.pool_name) ?? makePool(pool.pool_name);
    known.delete(pool.pool_name);
    fillPool(item, pool);
  }
  known.forEach((item) => item.remove());
}

function makePool(name) {
  const button = element("button", { type: "button", className: "pool" });
  button.append(
    element("span", { className: "name" }, element("span", { textContent: name }), element("span", { className: "use" })),
    element("progress", { ariaLabel: `Use of ${name}` }),
    element("span", { className: "soft about" }),
  );
  button.addEventListener("click", () => go({ pool: page.at.pool === name ? "" : name }));
  const item = element("li", {}, button);
  item.dataset.pool = name;
  $("pools").append(item);
  return item;
}

function fillPool(item, pool) {
  const away = page.engines.some((engine) => !engine.answers && engine.pools.includes(pool.pool_name));
  const about = [spaced(pool.type), pool.queued && `${pool.queued} queued`, !pool.enabled && "switched off", away && "engine does not answer"];
  text(item.querySelector(".use"), `${pool.current_running} / ${pool.max_concurrency}`);
  text(item.querySelector(".about"), about.filter(Boolean).join(" · "));
  item.querySelector(".about").classList.toggle("off", !pool.enabled);
  item.querySelector(".about").classList.toggle("away", away);
  const use = item.querySelector("progress");
  use.max = Math.max(1, pool.max_concurrency);
  use.value = pool.current_running;
  use.classList.toggle("full", pool.current_running >= pool.max_concurrency);
}

function markPool() {
  for (const item of $("pools").children) item.firstElementChild.setAttribute("aria-pressed", String(item.dataset.pool === page.at.pool));
}

// A runner in detail.

function open(id) {
  if (opened?.asked === id || (!opened && !id)) return;
  const before = opened?.id;
  opened?.abort.abort();
  opened = id ? { asked: id, id, record: null, abort: new AbortController(), looking: false, again: false, chars: 0 } : null;
  $("board").classList.toggle("open", Boolean(id));
  show($("detail"), id);
  if (!id) {
    rows.get(before)?.link.focus();
    return;
  }
  for (const each of ["log", "timeline", "record", "runner-state"]) $(each).replaceChildren();
  for (const each of ["diagnosis", "stop", "log-end"]) show($(each), false);
  complain($("runner-problem"), null);
  text($("log-state"), "");
  $("runner-title").replaceChildren(id);
  const known = fleet.runners.get(id);
  if (known && !known.partial) tellRecord(known);
  $("runner-title").focus({ preventScroll: innerWidth >= 1080 });
  const current = opened;
  look(current).then(() => current.record && followLog(current));
}

async function look(current) {
  if (current.looking) return void (current.again = true);
  current.looking = true;
  const { signal } = current.abort;
  try {
    do {
      current.again = false;
      const record = await read(`runners/${encodeURIComponent(current.asked)}`, { signal });
      const [history, diagnosis] = await Promise.all(
        ["events", "diagnosis"].map((part) => read(`runners/${record.runner_id}/${part}`, { signal })),
      );
      if (current !== opened) return;
      current.id = record.runner_id;
      current.record = record;
      fleet.put(record);
      complain($("runner-problem"), null);
      tellRecord(record);
      tellHistory(history.items);
      tellDiagnosis(diagnosis, record);
      render();
    } while (current.again);
  } catch (error) {
    if (current === opened && !signal.aborted) refuse(current, error);
  } finally {
    current.looking = false;
  }
}

function lookAgain() {
  const current = opened;
  current.timer ??= setTimeout(() => {
    current.timer = null;
    if (current === opened) look(current);
  }, RENDER_MS);
}

function refuse(current, error) {
  if (error instanceof Refused && error.status === 401) return leave(error);
  if (error instanceof Refused && error.status === 404) fleet.drop(current.id);
  render();
  complain($("runner-problem"), error);
}

function tellRecord(record) {
  const is = condition(record);
  $("runner-title").replaceChildren(`Task ${record.task_id}`, element("small", { textContent: record.runner_id }));
  const mark = element("span", { className: "state", textContent: capital(is) });
  mark.dataset.state = is;
  const took = record.started_at && record.finished_at ? `after ${span(Date.parse(record.finished_at) - Date.parse(record.started_at))}` : "";
  const parts = [took, words(record)].filter(Boolean).map((words) => element("span", { className: "soft", textContent: words }));
  $("runner-state").replaceChildren(mark, ...parts);
  show($("stop"), isLive(record) && record.phase !== "stopping");
  $("record").replaceChildren(...facts(record).flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", {}, value)]));
}

function facts(record) {
  const moment = (value) => value && element("time", { dateTime: value, textContent: clock.format(new Date(value)) });
  const code = (value) => value && element("span", { className: "mono", textContent: value });
  const { limits } = record;
  const limit = (value, unit, by) => value !== null && value !== undefined && `${value} ${unit}, ${by === "none" ? "enforced by nothing" : `enforced by ${by}`}`;
  const known = [
    ["Pool", record.pool_name],
    ["Slot", record.slot_id],
    ["Phase", record.phase],
    ["Reason", record.reason],
    ["Exit code", record.exit_code === null ? "" : `${record.exit_code ?? ""}`],
    ["Signal", record.signal],
    ["Out of memory", record.oom_killed && "yes"],
    ["May succeed if launched again", record.retryable === null ? "" : record.retryable ? "yes" : "no"],
    ["Created", moment(record.created_at)],
    ["Started", moment(record.started_at)],
    ["Finished", moment(record.finished_at)],
    ["Last heartbeat", moment(record.last_heartbeat)],
    ["Failed attempts", record.attempts?.length ? `${record.attempts.length}, the last: ${record.attempts.at(-1).error}` : ""],
    ["Node", record.node],
    ["Process", record.pid && `${record.pid}`],
    ["Container", code(record.container_id)],
    ["Job", code(record.job_name)],
    ["Image", code(record.image_digest)],
    ["CPU", limit(limits?.cpu, "cores", limits?.enforced_by.cpu)],
    ["Memory", limit(limits?.memory_mib, "MiB", limits?.enforced_by.memory_mib)],
    ["Isolation", record.isolation],
    ["Log", record.log_truncated && "its oldest part was dropped"],
    ["Labels", Object.entries(record.labels ?? {}).map(([key, value]) => `${key}=${value}`).join(", ")],
    ["Revision", `${record.revision}`],
  ];
  return known.filter(([, value]) => value);
}

function tellHistory(items) {
  const entries = items.slice(-500).map((event) => {
    const said = [spaced(event.reason), event.message].filter(Boolean).join(": ");
    const time = element("time", { dateTime: event.at, title: clock.format(new Date(event.at)), textContent: hours.format(new Date(event.at)) });
    const body = element("div", {}, element("span", { textContent: capital(spaced(event.type)) }));
    if (said) body.append(element("p", { textContent: capital(said) }));
    return element("li", {}, time, body);
  });
  $("timeline").replaceChildren(...entries);
}

function tellDiagnosis(diagnosis, record) {
  const telling = !isLive(record) || record.phase !== "running" || isStale(record);
  show($("diagnosis"), telling);
  $("diagnosis").dataset.state = condition(record);
  text($("diagnosis-title"), isLive(record) ? "What it waits for" : "What happened");
  text($("cause"), `${capital(diagnosis.likely_cause)}.`);
  text($("step"), `${diagnosis.next_step}.`);
}

// Its log.

async function followLog(current) {
  const { signal } = current.abort;
  for (let failures = 0; current === opened; failures += 1) {
    let problem = null;
    try {
      const response = await ask(`runners/${current.id}/logs?follow=true&tail=${LOG_LINES}`, { accept: "text/plain", signal });
      $("log").replaceChildren();
      current.chars = 0;
      text($("log-state"), isLive(current.record) ? "followed as it is written" : "");
      for await (const piece of pieces(response)) {
        if (current !== opened) return;
        failures = 0;
        write(current, piece);
      }
    } catch (error) {
      problem = error;
    }
    if (current !== opened) return;
    if (problem instanceof Refused) {
      text($("log-state"), problem.message);
      return;
    }
    await look(current);
    if (!problem && current.record && !isLive(current.record)) {
      text($("log-state"), "complete");
      return;
    }
    text($("log-state"), "cut off; reading it again…");
    await new Promise((resolve) => setTimeout(resolve, Math.min(15_000, 1000 * 2 ** failures)));
  }
}

const CONTROLS = /\x1b\[[0-9;?]*[ -\/]*[@-~]|\x1b[@-_]|\r(?=\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]/g; // colours and the like

function write(current, piece) {
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  const clean = piece.replace(CONTROLS, "");
  log.append(document.createTextNode(clean));
  current.chars += clean.length;
  while (current.chars > LOG_CHARACTERS && log.firstChild !== log.lastChild) {
    current.chars -= log.firstChild.length;
    log.firstChild.remove();
  }
  if (atEnd) log.scrollTop = log.scrollHeight;
  else show($("log-end"), true);
}

// Stopping.

function askToStop() {
  const record = opened.record ?? fleet.runners.get(opened.id); // what is shown before it was read anew
  text($("confirm-text"), `Task ${record.task_id}, ${record.runner_id}, in slot ${record.slot_id}.`);
  $("grace").value = "";
  complain($("confirm-problem"), null);
  $("confirm").returnValue = "";
  $("confirm").stops = record.runner_id;
  $("confirm").showModal();
}

async function stop(submitted) {
  submitted.preventDefault();
  const grace = $("grace").value;
  const button = $("confirm-form").querySelector("[type=submit]");
  button.disabled = true;
  try {
    const answer = await ask(`runners/${$("confirm").stops}${grace ? `?grace=${grace}` : ""}`, { method: "DELETE" });
    fleet.put(await answer.json());
    text($("said"), "It was asked to end.");
    $("confirm").close();
    if (opened) lookAgain();
    render();
  } catch (error) {
    complain($("confirm-problem"), error);
  } finally {
    button.disabled = false;
  }
}

// Coming and going.

async function enter() {
  try {
    await ask("pools");
  } catch (error) {
    if (error instanceof Refused && [401, 403].includes(error.status)) return leave(token.get() ? error : null);
    if (!token.get()) return leave(error); // nobody knows yet whether one is needed
  }
  show($("ask"), false);
  show($("board"), true);
  show($("leave"), token.get());
  $("skip").href = "#list";
  connected("busy", "Connecting…");
  page.connection = new AbortController();
  render();
  connect();
}

function leave(problem = null) {
  const connection = page.connection;
  page.connection = null;
  connection?.abort();
  page.wake();
  opened?.abort.abort();
  opened = null;
  $("board").classList.remove("open");
  show($("detail"), false);
  forget();
  token.set("");
  page.pools = [];
  page.engines = [];
  renderPools();
  rows.forEach((row) => row.item.remove());
  rows.clear();
  if ($("confirm").open) $("confirm").close();
  connected("off", "");
  document.title = "Runner Launcher";
  show($("board"), false);
  show($("leave"), false);
  show($("ask"), true);
  complain($("token-problem"), problem);
  $("token").value = "";
  $("token").focus();
}

$("token-form").addEventListener("submit", (submitted) => {
  submitted.preventDefault();
  token.set($("token").value.trim().replace(/^Bearer\s+/i, ""));
  complain($("token-problem"), null);
  enter();
});
$("leave").addEventListener("click", () => leave());
$("skip").addEventListener("click", (clicked) => {
  clicked.preventDefault(); // the address says which runner is open
  $("list").focus();
});
$("states").addEventListener("change", (changed) => go({ state: changed.target.value }));
let typing = 0;
$("query").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => go({ query: $("query").value.trim() }), 120);
});
$("clear").addEventListener("click", () => {
  $("query").value = "";
  go({ state: "", pool: "", query: "" });
});
$("previous").addEventListener("click", () => turn(-ROWS));
$("next").addEventListener("click", () => turn(ROWS));
$("older").addEventListener("click", async () => {
  $("older").disabled = true;
  try {
    const { items, next_cursor } = await read(`runners?${new URLSearchParams({ limit: 500, cursor: page.older })}`);
    items.forEach((record) => fleet.put(record));
    page.older = next_cursor;
  } catch (error) {
    text($("said"), error.message);
  }
  $("older").disabled = false;
  render();
});
$("retry").addEventListener("click", () => page.wake());
$("stop").addEventListener("click", askToStop);
$("keep").addEventListener("click", () => $("confirm").close());
$("confirm-form").addEventListener("submit", stop);
$("log-end").addEventListener("click", () => {
  $("log").scrollTop = $("log").scrollHeight;
  $("log").focus();
});
$("log").addEventListener("scroll", () => {
  if ($("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 40) show($("log-end"), false);
});
addEventListener("hashchange", locate);
addEventListener("online", () => page.wake());
addEventListener("keydown", (pressed) => {
  const typing = pressed.target instanceof HTMLInputElement;
  if (pressed.key === "/" && !typing && !$("board").hidden && !$("confirm").open) {
    pressed.preventDefault();
    $("query").focus();
  }
  if (pressed.key === "Escape" && opened && !typing && !$("confirm").open) location.hash = address({ id: null });
});
let hiding = 0;
document.addEventListener("visibilitychange", () => {
  clearTimeout(hiding);
  if (document.hidden) hiding = setTimeout(() => page.connection?.abort(), HIDDEN_MS);
  else {
    page.wake();
    check();
  }
});
setInterval(() => page.loaded && !document.hidden && render(), 1000);
setInterval(() => page.loaded && !document.hidden && refreshSoon(), ENGINES_MS);
setInterval(check, CHECK_MS);

function turn(rows) {
  page.first = Math.max(0, page.first + rows);
  render();
  $("list").scrollIntoView({ block: "start" });
}

locate();
enter();
