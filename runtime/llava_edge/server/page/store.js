// Conversations in this browser: IndexedDB, or memory alone where a browser keeps nothing.

const store = {
  database: null,
  memory: new Map(),
  tabs: null, // other tabs with this page, which keep the same conversations
  onChange: () => {},

  async open() {
    this.database = await new Promise((resolve) => {
      let request;
      try { request = indexedDB.open("llava-edge", 1); } catch { resolve(null); return; }
      request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => resolve(null);
    });
    for (const each of (await this.ask("readonly", (table) => table.getAll())) ?? []) this.memory.set(each.id, each);
    this.tabs = new BroadcastChannel("llava-edge");
    this.tabs.onmessage = ({ data }) => this.readAgain(data);
  },

  async readAgain(id) {
    const each = await this.ask("readonly", (table) => table.get(id));
    if (!this.database) return;
    if (each) this.memory.set(id, each);
    else this.drop(id);
    this.onChange(id);
  },

  drop(id) {
    const gone = this.memory.get(id);
    if (gone) gone.deleted = true;
    this.memory.delete(id);
  },

  list() {
    return [...this.memory.values()].sort((a, b) => b.changed - a.changed);
  },

  async save(conversation) {
    if (conversation.deleted) return; // while its answer was being written
    conversation.changed = Date.now();
    this.memory.set(conversation.id, conversation);
    await this.ask("readwrite", (table) => table.put(conversation));
    this.tabs?.postMessage(conversation.id);
  },

  async remove(id) {
    this.drop(id);
    await this.ask("readwrite", (table) => table.delete(id));
    this.tabs?.postMessage(id);
  },

  async clear() {
    await Promise.all([...this.memory.keys()].map((id) => this.remove(id)));
  },

  ask(mode, work) {
    if (!this.database) return Promise.resolve(null);
    return new Promise((resolve) => {
      let request;
      try {
        request = work(this.database.transaction("conversations", mode).objectStore("conversations"));
      } catch { // the browser has closed it
        this.database = null;
        warn("This browser keeps nothing any more: reload the page to have new conversations kept.");
        resolve(null);
        return;
      }
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => { warn("This browser has no room left: the conversation is not kept."); resolve(null); };
    });
  },
};

const settings = {
  values: { temperature: 0, maxTokens: 256, imageTokens: 0, system: "", key: "", theme: "", current: "" },

  load() {
    try { Object.assign(this.values, JSON.parse(localStorage.getItem("llava-edge") ?? "{}")); } catch { /* the defaults */ }
  },

  set(name, value) {
    this.values[name] = value;
    try { localStorage.setItem("llava-edge", JSON.stringify(this.values)); } catch { /* kept until the page is closed */ }
  },
};
