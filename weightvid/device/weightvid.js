/**
 * Reads weightvid archives in the browser: an ES module beside weightvid.wasm. In Node, which fetches no
 * files, first `prepare(await readFile("weightvid.wasm"))`, and `open` the bytes of an archive.
 *
 *     import { open } from "./weightvid.js";
 *     const archive = await open("model.mp4");
 *     for await (const { name, dtype, shape, data } of archive) ...   // as the file arrives
 *     const { data } = await archive.tensor("layer1.weight");         // by HTTP ranges
 *     const coarse = await open("model.mp4", { layers: 1 });          // of a progressive archive
 *     const later = await open("update.mp4", { base: archive });      // of an update
 *
 * F64, F32, F16 and BF16 come as Float32Array; integers in their own arrays; all other types as the
 * bytes of their elements. HEVC is decoded by weightvid.wasm, AV1 and H.264 by WebCodecs where the
 * browser has them; the SHA-256 of each picture is compared, whoever decodes it.
 */

const DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
  "F6_E2M3", "F6_E3M2", "F4", "C64", "C128", "C32", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"];
const ARRAYS = { I64: BigInt64Array, I32: Int32Array, I16: Int16Array, I8: Int8Array, U64: BigUint64Array,
  U32: Uint32Array, U16: Uint16Array, C64: Float32Array, C128: Float64Array };
const STORED = 255, F32 = 1, READ = 3, CODEC = 11;
const RANGE = 1 << 18; // bytes fetched at a time, at least

let compiled;

/** Compiles weightvid.wasm, once; `source` is its address or bytes (default: beside this module). */
export async function prepare(source = new URL("weightvid.wasm", import.meta.url)) {
  const bytes = source instanceof ArrayBuffer || ArrayBuffer.isView(source)
    ? source : await (await fetched(source)).arrayBuffer();
  compiled = WebAssembly.compile(bytes);
  return compiled;
}

async function fetched(url, options) { return good(await fetch(url, options), url); }

function good(response, url) {
  if (!response.ok) throw new Error(`${url || "the response"}: the server answered ${response.status}`);
  return response;
}

/** What WebCodecs calls a track, by its entry and configuration (ISO/IEC 14496-15; AV1's says little). */
function codecOf(entry, config) {
  const hex = (byte) => byte.toString(16).padStart(2, "0");
  if (entry === "av01") return "av01.0.08M.08";
  if (entry === "avc1") return `avc1.${[...config.subarray(1, 4)].map(hex).join("")}`;
  let flags = 0; // of compatible profiles, the last first
  for (let bit = 0; bit < 32; bit++) flags += ((config[2 + (bit >> 3)] >> (7 - bit % 8)) & 1) * 2 ** bit;
  return `hvc1.${config[1] & 31}.${flags.toString(16)}.${config[1] & 32 ? "H" : "L"}${config[12]}.${hex(config[6])}`;
}

/** An archive; made by `open`. Its names and metadata are known once its header has arrived. */
export class Archive {
  #wasm; #session; #source; #options; #external; #closed = false;
  #queue; // of calls: an update and its base take turns

  constructor(wasm, source, options) {
    this.#wasm = wasm;
    this.#source = source;
    this.#options = options;
    this.#queue = options.base?.#queue ?? { last: Promise.resolve() };
    this.size = source.size;
  }

  /** An update lies in the memory of its base. */
  static async open(source, options) {
    const made = options.base?.#wasm
      ?? (await WebAssembly.instantiate(await (compiled ?? prepare()), {})).exports;
    const archive = new Archive(made, source, options);
    archive.#use();
    await archive.#turn(() => archive.#start(0));
    return archive;
  }

  /** Names of all tensors, aliases included. */
  get names() { return this.#tensors().map((tensor) => tensor.name); }

  /** Text metadata of the model; a text ends at its first NUL character. Without a prototype, as keys may have any name. */
  get metadata() {
    this.#use();
    const found = Object.create(null);
    for (let place = 0, pair; (pair = this.#wasm.metadata(this.#session, place)); place++) {
      const [key, value] = new Uint32Array(this.#wasm.memory.buffer, pair, 2);
      found[this.#text(key)] = this.#text(value);
    }
    return found;
  }

  /** How many layers the archive has. */
  get layers() {
    this.#use();
    return this.#layers(this.#session)[0];
  }

  /** Name, element type and shape of a tensor. */
  info(name) {
    const found = this.#tensors().find((tensor) => tensor.name === name);
    if (!found) throw new Error(`the archive has no tensor ${JSON.stringify(name)}`);
    return found;
  }

  /** One tensor: {name, dtype, shape, data}; only its part of the file is fetched. */
  async tensor(name) {
    const found = this.info(name);
    return this.#turn(() => this.#load(found));
  }

  /**
   * All tensors in the order of the file; those of a stream as they arrive. Of a file that ends early,
   * or whose download fails, those come at last of which lower layers are there, with `coarse` true;
   * then there is an error.
   */
  async* [Symbol.asyncIterator]() {
    if (this.#external || this.#options.base) {
      for (const { name } of this.#tensors()) yield await this.tensor(name);
      return;
    }
    const { layers = Infinity, onLayer } = this.#options, wanted = Math.min(layers, this.layers);
    const wasm = this.#wasm, names = this.#tensors();
    const session = this.#there(wasm.open(0, 0, F32));
    let arrived = 0, failure;
    const stream = async function* (source) {
      try { yield* source.stream(); } catch (error) { failure = error; }
    };
    try {
      this.#check(wasm.use_layers(session, wanted));
      for await (const bytes of stream(this.#source)) {
        for (let at = 0; at < bytes.length; at += RANGE) {
          const some = bytes.subarray(at, at + RANGE), room = this.#copy(some);
          const status = wasm.push(session, room, some.length);
          wasm.release(room);
          yield* this.#arrived(session, names);
          this.#check(status);
        }
        const [of, now] = this.#layers(session);
        if (now > arrived) onLayer?.(arrived = now, of);
        if (now === wanted && wanted < of) break; // the rest need not come
      }
      const status = wasm.finish(session);
      yield* this.#arrived(session, names);
      if (failure) throw failure;
      this.#check(status);
    } finally {
      wasm.close(session);
    }
  }

  /** Gives the memory back, after the tensors that are being read; the archive cannot be used afterwards. */
  close() {
    if (this.#closed) return;
    this.#closed = true;
    this.#turn(() => this.#wasm.close(this.#session));
  }

  #use(what = "archive") {
    if (this.#closed) throw new Error(`the ${what} is closed`);
    this.#options.base?.#use("base");
  }

  #turn(call) {
    const made = this.#queue.last.then(call);
    this.#queue.last = made.catch(() => {});
    return made;
  }

  async #start(external) {
    const wasm = this.#wasm, { base, layers } = this.#options;
    this.#external = external;
    this.#session = this.#there(wasm.open(this.size, external, F32));
    try {
      const status = await this.#answered(() => wasm.start(this.#session, external));
      if (status !== CODEC || external) {
        this.#check(status);
        wasm.forget(this.#session);
        if (base) this.#check(wasm.use_base(this.#session, base.#session));
        if (layers !== undefined) this.#check(wasm.use_layers(this.#session, Math.min(layers, 255)));
        return;
      }
    } catch (error) {
      wasm.close(this.#session);
      throw error;
    }
    wasm.close(this.#session);
    await this.#start(1); // not HEVC
  }

  /** Calls until nothing is missing that it wants of this archive or its bases. */
  async #answered(call) {
    for (;;) {
      const status = call();
      if (status !== READ && status !== CODEC) return status;
      let one = this;
      while (one && !(await one.#gave())) one = one.#options.base;
      if (!one) return status;
    }
  }

  /** Gets what the last call missed of this archive; false: it missed nothing. */
  async #gave() {
    const wasm = this.#wasm, session = this.#session;
    const [wanted, bytes, packet] = new Uint32Array(wasm.memory.buffer, wasm.fields(session), 3);
    if (wanted === 1) {
      const at = wasm.wanted_at(session);
      const found = await this.#source.range(at, Math.min(Math.max(bytes, RANGE), this.size - at));
      if (found.length < bytes) throw new Error("the file is shorter than it was");
      this.#there(wasm.give(session, 1, at, this.#copy(found), found.length));
    } else if (wanted) {
      const luma = await this.#decode(new Uint8Array(wasm.memory.buffer, packet, bytes).slice());
      this.#there(wasm.give(session, 2, 0, this.#copy(luma), luma.length));
    }
    return wanted > 0;
  }

  #forget() {
    this.#wasm.forget(this.#session);
    this.#options.base?.#forget();
  }

  #layers(session) { return new Uint32Array(this.#wasm.memory.buffer, this.#wasm.layers(session), 2); }

  async #load(info) {
    const wasm = this.#wasm, type = DTYPES.indexOf(info.dtype) < 4 ? F32 : STORED;
    const bytes = wasm.bytes(info.address, type), room = this.#there(wasm.alloc(bytes));
    try {
      this.#check(await this.#answered(() => wasm.load(this.#session, info.address, type, room, bytes)));
      return this.#made(info, room, bytes);
    } finally {
      wasm.release(room);
      this.#forget();
    }
  }

  /** Luma of a packet by WebCodecs. */
  async #decode(packet) {
    const fields = new Uint32Array(this.#wasm.memory.buffer, this.#wasm.fields(this.#session), 7);
    const [, , , config, configBytes, width, height] = fields;
    const description = new Uint8Array(this.#wasm.memory.buffer, config, configBytes).slice();
    const entry = this.#text(this.#wasm.entry(this.#session), 4), codec = codecOf(entry, description);
    if (typeof VideoDecoder === "undefined") throw new Error(`this browser has no WebCodecs, which ${entry} needs`);
    const settings = { codec, codedWidth: width, codedHeight: height, ...(entry === "av01" ? {} : { description }) };
    if (!(await VideoDecoder.isConfigSupported(settings)).supported)
      throw new Error(`this browser does not decode ${codec} of ${width} x ${height}`);
    let picture, failure;
    const decoder = new VideoDecoder({ output: (frame) => { picture = frame; }, error: (error) => { failure = error; } });
    decoder.configure(settings);
    // The key frame of an AV1 track needs its sequence header, which stands in the configuration.
    const data = entry === "av01" ? new Uint8Array([...description.subarray(4), ...packet]) : packet;
    decoder.decode(new EncodedVideoChunk({ type: "key", timestamp: 0, data }));
    await decoder.flush().catch((error) => { failure ??= error; });
    if (decoder.state !== "closed") decoder.close();
    if (!picture) throw new Error(`the browser's decoder failed: ${failure?.message ?? "no picture"}`);
    const all = new Uint8Array(picture.allocationSize()), [plane] = await picture.copyTo(all);
    picture.close();
    const luma = new Uint8Array(width * height);
    for (let row = 0; row < height; row++)
      luma.set(all.subarray(plane.offset + row * plane.stride, plane.offset + row * plane.stride + width), row * width);
    return luma;
  }

  * #arrived(session, infos) {
    for (let place; (place = this.#wasm.next(session));) {
      const [tensor, room, bytes, coarse] = new Uint32Array(this.#wasm.memory.buffer, place, 4);
      const number = new Uint32Array(this.#wasm.memory.buffer, tensor, 10)[8];
      try {
        for (const info of infos.filter((one) => one.number === number)) yield { ...this.#made(info, room, bytes), coarse: !!coarse };
      } finally {
        this.#wasm.release(place); // also where the caller's loop ends here
      }
    }
  }

  #made({ name, dtype, shape }, room, bytes) {
    const Kind = DTYPES.indexOf(dtype) < 4 ? Float32Array : ARRAYS[dtype] ?? Uint8Array;
    return { name, dtype, shape, data: new Kind(this.#wasm.memory.buffer.slice(room, room + bytes)) };
  }

  #tensors() {
    this.#use();
    const found = [];
    for (let place = 0; place < this.#wasm.count(this.#session); place++) {
      const address = this.#wasm.tensor(this.#session, place);
      const [name, nameBytes, dtype, axes, shape, , , , number] = new Uint32Array(this.#wasm.memory.buffer, address, 9);
      const sizes = [...new BigUint64Array(this.#wasm.memory.buffer, shape, axes)].map(Number);
      found.push({ name: this.#text(name, nameBytes), dtype: DTYPES[dtype], shape: sizes, number, address });
    }
    return found;
  }

  #text(address, bytes) {
    const memory = new Uint8Array(this.#wasm.memory.buffer);
    return new TextDecoder().decode(memory.subarray(address, bytes === undefined ? memory.indexOf(0, address) : address + bytes));
  }

  #copy(bytes) {
    const room = this.#there(this.#wasm.alloc(bytes.length));
    new Uint8Array(this.#wasm.memory.buffer).set(bytes, room);
    return room;
  }

  #there(address) {
    if (!address) throw new Error("out of memory");
    return address;
  }

  #check(status) {
    if (status) throw new Error(this.#text(this.#wasm.status_text(status)));
  }
}

/** A file that is in memory. */
function fromBytes(bytes) {
  return { size: bytes.length, range: async (at, count) => bytes.subarray(at, at + count), stream: async function* () { yield bytes; } };
}

/** A file at an address: by ranges where the server has them, otherwise fetched whole. */
async function fromAddress(url, onProgress) {
  const first = await fetched(url, { headers: { Range: "bytes=0-0" } });
  if (first.status !== 206) return fromBytes(new Uint8Array(await read(first, onProgress)));
  const total = (response) => Number(response.headers.get("Content-Range")?.split("/")[1]), size = total(first);
  // An encoded answer has an ETag of its own; dates count where one of the answers has no ETag.
  const version = ({ headers }) => ({
    tag: headers.has("Content-Encoding") ? null : headers.get("ETag")?.replace(/^W\//, ""), date: headers.get("Last-Modified") });
  const was = version(first);
  const same = async (options) => {
    const response = await fetch(url, options), { tag, date } = version(response), now = total(response);
    if (response.status !== 416) good(response, url); // 416: it is shorter now
    const changed = tag && was.tag ? tag !== was.tag : date && was.date && date !== was.date;
    if (!changed && !(now >= 0 && now !== size) && response.ok) return response;
    await response.body?.cancel();
    throw new Error(`the file at ${url} has changed`);
  };
  await first.arrayBuffer();
  if (!Number.isSafeInteger(size)) return fromBytes(new Uint8Array(await read(await fetched(url), onProgress)));
  return {
    size,
    async range(at, count) {
      const response = await same({ headers: { Range: `bytes=${at}-${at + count - 1}` } });
      if (response.status !== 206) throw new Error(`${url}: the server no longer answers ranges`);
      return new Uint8Array(await response.arrayBuffer());
    },
    async* stream() {
      const reader = (await same()).body.getReader();
      try {
        for (let have = 0; ;) {
          const { done, value } = await reader.read();
          if (done) return;
          onProgress?.(have += value.length, size);
          yield value;
        }
      } finally {
        await reader.cancel();
      }
    },
  };
}

async function read(response, onProgress) {
  const bytes = await response.arrayBuffer();
  onProgress?.(bytes.byteLength, bytes.byteLength);
  return bytes;
}

/**
 * Opens an archive.
 *
 * @param {string|URL|ArrayBuffer|Uint8Array|Response} source
 * @param {{onProgress?: (bytes: number, of: number) => void, base?: Archive, layers?: number,
 *          onLayer?: (arrived: number, of: number) => void}} options
 *   onProgress, onLayer: called while a stream arrives, of how many bytes and whole layers are there;
 *   base: what an update adds to, which stays open; layers: so many of the first ones alone, 1 at least.
 * @returns {Promise<Archive>}
 */
export async function open(source, options = {}) {
  const { onProgress, base, layers } = options;
  if (base != null && !(base instanceof Archive)) throw new TypeError("base: an archive that open() gave is wanted");
  if (layers !== undefined && !(Number.isInteger(layers) && layers > 0))
    throw new TypeError(`layers: a whole number above 0 is wanted, not ${String(layers)}`);
  const bytes = source instanceof ArrayBuffer ? new Uint8Array(source)
    : source instanceof Response ? new Uint8Array(await read(good(source, source.url), onProgress))
      : ArrayBuffer.isView(source) ? new Uint8Array(source.buffer, source.byteOffset, source.byteLength) : null;
  return Archive.open(bytes ? fromBytes(bytes) : await fromAddress(source, onProgress), options);
}
