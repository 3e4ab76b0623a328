// The service, as the page asks it: with a token in a header, never in an address; answers as JSON, streams as they come.

const KEEPS = "runner-launcher-token";
const SILENT_MS = 45_000; // a stream that is alive says something every 15 seconds

export class Refused extends Error {
  constructor(status, code, detail) {
    super(detail);
    this.status = status;
    this.code = code;
  }
}

export const token = {
  get: () => sessionStorage.getItem(KEEPS) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEEPS, value) : sessionStorage.removeItem(KEEPS)),
};

/** Ask; give the response. Throws Refused for a problem, TypeError when nobody answers. */
export async function ask(path, { accept = "application/json", headers = {}, ...options } = {}) {
  const authorization = token.get() ? { Authorization: `Bearer ${token.get()}` } : {};
  const response = await fetch(path, {
    cache: "no-store",
    credentials: "omit",
    redirect: "error",
    headers: { Accept: accept, ...authorization, ...headers },
    ...options,
  });
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  throw new Refused(response.status, problem.code, problem.detail ?? `the service answered ${response.status}`);
}

export const read = async (path, options) => (await ask(path, options)).json();

/** All runners that a query finds, by pages as they come. */
export async function* pages(query, signal) {
  let cursor = null;
  do {
    const page = await read(`runners?${new URLSearchParams({ ...query, limit: 500, ...(cursor && { cursor }) })}`, { signal });
    yield page;
    cursor = page.next_cursor;
  } while (cursor);
}

/** The text of an endless answer, piece by piece. Throws when it has been silent for too long, if it should not be. */
export async function* pieces(response, silentMs = 0) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  try {
    for (;;) {
      const { value, done } = await (silentMs ? soon(reader.read(), silentMs) : reader.read());
      const text = decoder.decode(value, { stream: !done });
      if (text) yield text;
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** What happens to all runners, from behind a revision or from now on: {name, id, data}. */
export async function* events(revision, signal) {
  const headers = revision === null ? {} : { "Last-Event-ID": String(revision) };
  const response = await ask("events", { accept: "text/event-stream", headers, signal });
  let rest = "";
  for await (const text of pieces(response, SILENT_MS)) {
    const frames = (rest + text).split(/\r?\n\r?\n/);
    rest = frames.pop();
    yield frames.map(frame).filter((each) => each.data);
  }
}

function frame(text) {
  const told = { name: "message", id: null, data: "" };
  for (const line of text.split(/\r?\n/)) {
    const [, field, value] = /^([^:]*):? ?(.*)$/s.exec(line);
    if (field === "event") told.name = value;
    if (field === "id") told.id = Number(value);
    if (field === "data") told.data += value;
  }
  return told;
}

async function soon(promise, milliseconds) {
  let timer;
  const late = new Promise((_, fail) => (timer = setTimeout(() => fail(new TypeError("the stream fell silent")), milliseconds)));
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}
