// MQTT.js over WebTransport: one bidirectional stream carries the bytes that a WebSocket would carry. Where
// WebTransport is not available, MQTT.js' own stream (wss) takes over, for the same client and session.
import { Duplex } from './readable-stream.js'

/** Milliseconds for opening WebTransport. Where UDP is blocked there is no error, only silence. */
const TIMEOUT_MS = 3000
/** Milliseconds during which a fallback that worked is used without trying WebTransport again. */
const RETRY_AFTER_MS = 600_000
/** Milliseconds for an orderly end of the stream. */
const CLOSE_MS = 1000
/** Bytes that wait in each direction before the sender is slowed down. */
const HIGH_WATER_BYTES = 64 * 1024

/** Earlier results for each URL, shared by all clients of the page. */
const known = new Map()

/**
 * `mqtt.connect(url, options)`, with WebTransport tried first.
 *
 * @param mqtt MQTT.js
 * @param url the address that MQTT.js would connect to, used as the fallback
 * @param options MQTT.js' options and `webTransport`: a URL or its settings, see index.d.ts
 */
export function connect(mqtt, url, options = {}) {
  const { webTransport, ...rest } = options
  const settings = settled(webTransport)
  const client = mqtt.connect(url, { ...rest, manualConnect: true })
  client.options.manualConnect = rest.manualConnect
  client.streamBuilder = builder(settings, client.streamBuilder)
  if (!rest.manualConnect) client.connect()
  return client
}

/**
 * A stream builder for `new mqtt.MqttClient(streamBuilder(...), options)`.
 *
 * @param webTransport as in `connect`
 * @param fallback another stream builder; without one, only WebTransport is used
 */
export function streamBuilder(webTransport, fallback) {
  return builder(settled(webTransport), fallback)
}

function builder(settings, fallback) {
  const { url, timeout, retryAfter, init, onTransport } = settings
  // An error of the app's callback must not lead to a fallback.
  const tell = (...what) => {
    try {
      onTransport(...what)
    } catch (error) {
      queueMicrotask(() => {
        throw error
      })
    }
  }
  const memory = known.get(url) ?? { avoidUntil: 0, suspect: false }
  known.set(url, memory)

  return (client) => {
    // MQTT.js gives up a connection after connectTimeout; WebTransport and the fallback both have to fit.
    const patience = Math.min(timeout, (client.options.connectTimeout || 30_000) / 2)
    const instead = (why) => {
      const stream = fallback(client)
      memory.suspect = false
      // A fallback that gets a CONNACK shows that the network works and WebTransport is blocked.
      once(client, stream, () => (memory.avoidUntil = Date.now() + retryAfter))
      tell('fallback', why)
      return stream
    }
    if (fallback) {
      if (typeof globalThis.WebTransport !== 'function') return instead('no WebTransport here')
      if (memory.suspect) return instead('the last connection over WebTransport came to nothing')
      if (Date.now() < memory.avoidUntil) {
        const stream = fallback(client)
        tell('fallback', 'WebTransport failed a while ago')
        return stream
      }
    }
    const ways = async (signal) => {
      let side
      try {
        side = await openWebTransport(url, init, patience, signal)
      } catch (error) {
        if (!fallback || signal.aborted) throw error
        return sideOf(instead(String(error?.message ?? error)))
      }
      tell('webtransport')
      // If this connection opens and never gets a CONNACK, the next one uses the fallback.
      let worked = false
      once(client, stream, () => (worked = true))
      stream.once('close', () => (memory.suspect = !worked))
      return side
    }
    const stream = new LateStream(ways)
    return stream
  }
}

/** Calls `then` if the client gets its CONNACK on this stream. */
function once(client, stream, then) {
  client.once('connect', then)
  stream.once('close', () => client.removeListener('connect', then))
}

/** A Duplex over a transport that is still being opened: `{ read, write, finish, close }`. */
class LateStream extends Duplex {
  #abort = new AbortController()
  #side
  #closing

  constructor(open) {
    super({ allowHalfOpen: false, readableHighWaterMark: HIGH_WATER_BYTES, writableHighWaterMark: HIGH_WATER_BYTES })
    // Runs after this constructor, so that `open` can use the stream.
    this.#side = Promise.resolve().then(() => open(this.#abort.signal))
    this.#side.catch((error) => this.destroy(error))
  }

  // Called when there is demand, and again only after a push: other data stays on the wire.
  _read() {
    this.#side
      .then((side) => side.read())
      .then((bytes) => this.push(bytes))
      .catch((error) => this.destroy(error))
  }

  _write(chunk, _encoding, done) {
    this.#side.then((side) => side.write(chunk)).then(() => done(), done)
  }

  // MQTT.js writes a packet in many pieces.
  _writev(chunks, done) {
    const total = chunks.reduce((sum, { chunk }) => sum + chunk.length, 0)
    const all = new Uint8Array(total)
    let at = 0
    for (const { chunk } of chunks) {
      all.set(chunk, at)
      at += chunk.length
    }
    this._write(all, 'buffer', done)
  }

  _final(done) {
    this.#closing = setTimeout(() => this.destroy(), CLOSE_MS)
    this.#side
      .then((side) => side.finish())
      // The transport may have ended already.
      .catch(() => {})
      .then(() => done())
  }

  _destroy(error, done) {
    clearTimeout(this.#closing)
    this.#abort.abort()
    this.#side.then((side) => side.close()).catch(() => {})
    done(error)
  }
}

async function openWebTransport(url, init, patience, signal) {
  signal.throwIfAborted()
  const transport = new globalThis.WebTransport(url, init)
  // Both promises may reject at any time; the code that needs them handles that.
  for (const one of [transport.ready, transport.closed]) one.catch(() => {})
  let timer
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`no WebTransport within ${patience} ms`)), patience)
    signal.addEventListener('abort', () => reject(new Error('given up')), { once: true })
  })
  try {
    await Promise.race([transport.ready, late])
    const stream = await Promise.race([transport.createBidirectionalStream(), late])
    return side(transport, stream)
  } catch (error) {
    transport.close()
    throw error
  } finally {
    clearTimeout(timer)
    late.catch(() => {})
  }
}

function side(transport, { readable, writable }) {
  const reader = readable.getReader()
  const writer = writable.getWriter()
  writer.closed.catch(() => {})

  // The session closes after the stream, with a more precise reason.
  const ended = async (error) => {
    let timer
    const late = new Promise((done) => (timer = setTimeout(done, CLOSE_MS)))
    const session = await Promise.race([transport.closed, late]).catch((e) => e)
    clearTimeout(timer)
    if (session?.closeCode) throw failure(`session closed with code ${session.closeCode}`, session)
    if (error && session?.closeCode === undefined) throw error
    return null
  }
  return {
    async read() {
      let got
      try {
        got = await reader.read()
      } catch (error) {
        return ended(error)
      }
      return got.done ? ended() : got.value
    },
    async write(chunk) {
      // Flow control: resolves when there is room again.
      await writer.ready
      await writer.write(chunk)
    },
    finish: () => writer.close(),
    close: () => transport.close(),
  }
}

// MQTT.js emits `error` for errors with a code, and reconnects silently after others.
function failure(message, { closeCode, reason }) {
  return Object.assign(new Error(message), { code: 'ERR_WEBTRANSPORT_CLOSED', closeCode, reason })
}

/** Gives MQTT.js' own Duplex the same interface. */
function sideOf(stream) {
  // Read and write report the error too.
  stream.on('error', () => {})
  const bytes = stream[Symbol.asyncIterator]()
  return {
    read: async () => {
      try {
        const { done, value } = await bytes.next()
        return done ? null : value
      } catch (error) {
        // Closed without an error of its own: an ordinary end.
        if (error?.code === 'ERR_STREAM_PREMATURE_CLOSE') return null
        throw error
      }
    },
    write: (chunk) => new Promise((done, failed) => stream.write(chunk, (error) => (error ? failed(error) : done()))),
    finish: () => new Promise((done) => stream.end(done)),
    close: () => stream.destroy(),
  }
}

function settled(webTransport) {
  const { url, timeout = TIMEOUT_MS, retryAfter = RETRY_AFTER_MS, onTransport = () => {}, serverCertificateHashes, ...more } =
    typeof webTransport === 'string' || webTransport instanceof URL ? { url: webTransport } : (webTransport ?? {})
  const parsed = new URL(url)
  if (parsed.protocol !== 'https:' || parsed.hash) throw new TypeError(`not an https URL without fragment: ${url}`)
  const init = { ...more, protocols: ['mqtt'] }
  if (serverCertificateHashes) init.serverCertificateHashes = serverCertificateHashes.map(hash)
  return { url: parsed.href, timeout, retryAfter, onTransport, init }
}

/** Turns a SHA-256 in hexadecimal into the object that the browser wants; other values pass unchanged. */
function hash(given) {
  if (typeof given !== 'string') return given
  if (!/^([0-9a-f]{2}:?){32}$/i.test(given)) throw new TypeError(`not a SHA-256 in hexadecimal: ${given}`)
  const digits = given.replaceAll(':', '').match(/../g)
  return { algorithm: 'sha-256', value: Uint8Array.from(digits, (two) => Number.parseInt(two, 16)) }
}
