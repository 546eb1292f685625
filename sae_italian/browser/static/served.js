// The page from the server: records and live work as JSON, by relative addresses of the same origin only.
async function ask(name, argument) {
  const work = argument !== undefined && typeof argument === "object";
  const headers = { "Content-Type": "application/json", "X-Token": document.querySelector("meta[name=token]")?.content ?? "" };
  const options = work ? { method: "POST", headers, body: JSON.stringify(argument) } : {};
  let response, value;
  try {
    response = await fetch("api/" + (work ? "live/" + name : argument === undefined ? name : `${name}/${argument}`), options);
  } catch {
    throw fault("Il server non risponde: è ancora in funzione?", "The server does not answer; is it still running?");
  }
  try {
    value = await response.json();
  } catch {
    throw fault(`Risposta incompleta (${response.status}).`, `The answer is incomplete (${response.status}).`);
  }
  if (!response.ok) throw fault(value.error_it, value.error_en);
  return value;
}

mountRemote(document.getElementById("app"), ask);
