// What the page asks its server. Changes carry a header that other sites cannot set.

export class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "the page's server does not answer");
  }
  if (answer.status === 401) location.reload();
  if (!answer.ok) {
    const problem = await answer.json().catch(() => ({}));
    throw new Refused(answer.status, problem.error ?? `the page's server answers ${answer.status}`);
  }
  return answer.json();
}

/** A path with what is known of the parameters; a key may be empty. */
export function url(path, parameters = {}) {
  const known = Object.entries(parameters).filter(([name, value]) => value !== undefined && value !== null && (value !== "" || name === "id"));
  const query = new URLSearchParams(known).toString();
  return query ? `${path}?${query}` : path;
}

export function get(path, parameters, signal) {
  return ask(url(path, parameters), { signal });
}

export function post(path, body, signal) {
  return ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Florence": "1" },
    body: JSON.stringify(body),
    signal,
  });
}

/** Submits a picture: a line that says what is asked, then the bytes, if it is no address. */
export function submit(question, file) {
  const parts = [JSON.stringify(question), "\n"];
  if (file) parts.push(file);
  return ask("/api/submit", {
    method: "POST",
    headers: { "Content-Type": "application/octet-stream", "X-Florence": "1" },
    body: new Blob(parts),
  });
}
