// Requests to the server that this page is from.

const PATIENCE = 4; // times that a busy server is asked again

export class Refusal extends Error {}

/** GETs JSON. */
export async function get(path) {
  return read(await fetch(path));
}

/**
 * POSTs a picture, and asks again when the server is busy.
 * @param {string} path with its query.
 * @param {Blob} picture the file.
 * @param {AbortSignal} signal gives up.
 * @param {(text: string) => void} say tells the user why this takes long.
 * @returns {Promise<Response>} a good answer.
 * @throws {Refusal} with the server's words.
 */
export async function post(path, picture, signal, say = () => {}) {
  for (let attempt = 1; ; attempt++) {
    let response;
    try {
      response = await fetch(path, { method: "POST", body: picture, signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refusal("The server does not answer. Is it still running?");
    }
    if (response.ok) return response;
    const seconds = Number(response.headers.get("Retry-After"));
    if (response.status !== 503 || !seconds || attempt > PATIENCE) return read(response);
    say(`The server is busy. Trying again in ${seconds} s …`);
    await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
    signal?.throwIfAborted();
  }
}

async function read(response) {
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refusal(answer.error ?? `The server answered ${response.status}.`);
  return answer;
}
