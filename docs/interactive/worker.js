// Python in a thread of its own: the page stays alive while it loads and computes.
// Comes: {id, text}. Goes: {status}, {menu}, then {id, text} or {id, error} for each; {broken} where nothing works.

const engine = new URL("engine/", self.location).href;

async function fetched(name) {
  const response = await fetch(engine + name);
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  return response;
}

async function start() {
  const { missing } = await (await fetched("state.json")).json();
  if (missing) throw new Error(`This copy of the documentation was built without Python for the browser: ${missing}`);
  postMessage({ status: "Loading Python" });
  importScripts(engine + "pyodide.js");
  const [python, numpy, refattn, page] = await Promise.all([
    loadPyodide({ indexURL: engine }),
    fetched("numpy.zip").then((response) => response.arrayBuffer()),
    fetched("refattn.zip").then((response) => response.arrayBuffer()),
    fetch(new URL("page.py", self.location)).then((response) => response.text()),
  ]);
  postMessage({ status: "Importing NumPy" });
  const site = python.runPython("import site; site.getsitepackages()[0]");
  for (const archive of [numpy, refattn]) python.unpackArchive(archive, "zip", { extractDir: site });
  const namespace = python.globals.get("dict")();
  namespace.set("__name__", "page");
  python.runPython(page, { globals: namespace });
  postMessage({ menu: JSON.parse(namespace.get("menu")()) });
  return namespace.get("respond");
}

const ready = start();
ready.catch((error) => postMessage({ broken: error.message }));

onmessage = async ({ data: { id, text } }) => {
  let respond;
  try {
    respond = await ready;
  } catch {
    return; // said already
  }
  try {
    postMessage({ id, text: respond(text) });
  } catch (error) {
    postMessage({ id, error: error.message.trim().split("\n").pop() });
  }
};
