// All runners that the page knows, kept up to date by events. No element of the page is touched here.

const ENDED_KEPT = 5_000; // ended runners beyond these are forgotten, the oldest first

export const isLive = (runner) => runner.phase !== "finished";

/** What a person calls the condition of a runner: its phase, or how it ended. */
export const condition = (runner) => (isLive(runner) ? runner.phase : runner.state);

export class Fleet {
  runners = new Map();
  sorted = null;
  live = 0;

  /** Take a record, unless something newer is known already. */
  put(record) {
    const known = this.runners.get(record.runner_id);
    if (known && known.revision > record.revision) return;
    if (known && known.created_at === record.created_at) {
      this.count(known, record);
      this.replace(known, record);
    } else {
      this.count(known, record);
      this.runners.set(record.runner_id, { ...record });
      this.sorted = null;
    }
  }

  /** Take an event: what it says is known at once; the rest of the record is read when somebody looks (`partial`). */
  tell(event) {
    const known = this.runners.get(event.runner_id);
    if (known && known.revision >= event.revision) return;
    const accepted = Boolean(known?.started_at) || event.type === "started";
    const ended = event.to === "finished";
    this.put({
      labels: {},
      slot_id: "",
      created_at: event.at,
      ...known,
      runner_id: event.runner_id,
      task_id: event.task_id,
      pool_name: event.pool_name,
      started_at: known?.started_at ?? (accepted ? event.at : null),
      finished_at: ended ? event.at : null,
      phase: event.to,
      state: ended ? (event.reason ? "failed" : "completed") : accepted ? "running" : "pending",
      reason: ended ? event.reason : null,
      message: ended || !isSettled(event.to) ? event.message : null,
      revision: event.revision,
      partial: true,
    });
  }

  /** Take note that the service knows this runner no more. */
  drop(id) {
    const known = this.runners.get(id);
    if (!known) return;
    this.live -= isLive(known);
    this.runners.delete(id);
    this.sorted = null;
  }

  clear() {
    this.runners.clear();
    this.sorted = null;
    this.live = 0;
  }

  /** Newest first. */
  all() {
    if (!this.sorted) {
      this.sorted = [...this.runners.values()].sort(
        (a, b) => (a.created_at < b.created_at) - (a.created_at > b.created_at) || (a.runner_id < b.runner_id ? 1 : -1),
      );
      this.forget();
    }
    return this.sorted;
  }

  find({ state, pool, words }) {
    return this.all().filter(
      (runner) =>
        (!state || (state === "live" ? isLive(runner) : runner.state === state)) &&
        (!pool || runner.pool_name === pool) &&
        words.every((word) => haystack(runner).includes(word)),
    );
  }

  count(before, after) {
    this.live += isLive(after) - Boolean(before && isLive(before));
  }

  replace(known, record) {
    for (const key of Object.keys(known)) if (!(key in record)) delete known[key];
    Object.assign(known, record);
    delete known.haystack;
    if (!("partial" in record)) delete known.partial;
  }

  forget() {
    let spare = this.sorted.length - this.live - ENDED_KEPT;
    if (spare <= 0) return;
    const kept = [];
    for (const runner of this.sorted.toReversed()) {
      if (!isLive(runner) && spare-- > 0) this.runners.delete(runner.runner_id);
      else kept.push(runner);
    }
    this.sorted = kept.reverse();
  }
}

const isSettled = (phase) => phase === "running";

function haystack(runner) {
  runner.haystack ??= [
    runner.runner_id, runner.task_id, runner.slot_id, runner.pool_name, runner.phase, runner.state, runner.reason, runner.message,
    runner.node, ...Object.entries(runner.labels ?? {}).map(([key, value]) => `${key}=${value}`),
  ].join("\n").toLowerCase();
  return runner.haystack;
}
