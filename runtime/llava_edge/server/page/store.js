// Conversations in this browser: IndexedDB, or memory alone where a browser keeps nothing.

const store = {
  database: null,
  memory: new Map(),

  async open() {
    this.database = await new Promise((resolve) => {
      let request;
      try { request = indexedDB.open("llava-edge", 1); } catch { resolve(null); return; }
      request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => resolve(null);
    });
    for (const each of (await this.ask("readonly", (table) => table.getAll())) ?? []) this.memory.set(each.id, each);
  },

  list() {
    return [...this.memory.values()].sort((a, b) => b.changed - a.changed);
  },

  save(conversation) {
    if (conversation.deleted) return Promise.resolve(null); // while its answer was being written
    conversation.changed = Date.now();
    this.memory.set(conversation.id, conversation);
    return this.ask("readwrite", (table) => table.put(conversation));
  },

  remove(id) {
    const gone = this.memory.get(id);
    if (gone) gone.deleted = true;
    this.memory.delete(id);
    return this.ask("readwrite", (table) => table.delete(id));
  },

  clear() {
    for (const gone of this.memory.values()) gone.deleted = true;
    this.memory.clear();
    return this.ask("readwrite", (table) => table.clear());
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
