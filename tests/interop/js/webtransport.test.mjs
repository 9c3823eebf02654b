// Tests clients/mqtt-webtransport alone, on a simulated WebTransport.
import assert from 'node:assert/strict'
import { EventEmitter, once } from 'node:events'
import test, { beforeEach } from 'node:test'
import { Duplex } from 'readable-stream'
import { connect, streamBuilder } from '../../../clients/mqtt-webtransport/index.js'

/** All that can happen without time has happened: nothing here waits for anything but that, and timers. */
const tick = async () => {
  for (let turn = 0; turn < 3; turn++) await new Promise((done) => setImmediate(done))
}
let serial = 0
let opened

/** Opens, stays silent or fails, as `FakeTransport.way` says. */
class FakeTransport {
  static way = 'opens'

  constructor(url, init) {
    Object.assign(this, { url, init, pulls: 0, written: [], sinks: [], finished: false, closeInfo: undefined })
    this.closed = new Promise((yes, no) => Object.assign(this, { end: yes, break: no }))
    this.ready = FakeTransport.way === 'opens' ? Promise.resolve() : FakeTransport.way === 'fails' ? Promise.reject(new Error('refused')) : new Promise(() => {})
    opened.push(this)
  }

  async createBidirectionalStream() {
    const readable = new ReadableStream(
      { start: (c) => (this.source = c), pull: () => void this.pulls++ },
      { highWaterMark: 0 },
    )
    const writable = new WritableStream({
      // Each write waits until the test lets it through.
      write: (chunk) => new Promise((done) => (this.written.push(Buffer.from(chunk)), this.sinks.push(done))),
      close: () => void (this.finished = true),
    })
    return { readable, writable }
  }

  close(info = {}) {
    this.closeInfo = info
    this.end({ closeCode: 0, reason: '' })
  }
}

/** Two streams; what goes into one comes out of the other. */
function pair() {
  const make = (other) =>
    new Duplex({
      read() {},
      write: (chunk, _, done) => (other().push(chunk), done()),
      final: (done) => (other().push(null), done()),
    })
  const near = make(() => far)
  const far = make(() => near)
  return [near, far]
}

class Client extends EventEmitter {
  options = { connectTimeout: 30_000 }
}

function setup(settings = {}, fallback = true) {
  const client = new Client()
  const others = []
  const events = []
  const came = new EventEmitter()
  /** That so many streams of the other way were asked for. */
  const asked = async (count) => {
    while (others.length < count) await once(came, 'another')
  }
  const other = () => {
    const [near, far] = pair()
    others.push(far)
    came.emit('another')
    return near
  }
  const url = `https://edge.example/${serial++}`
  const onTransport = (way, why) => events.push([way, why])
  const build = streamBuilder({ url, timeout: 40, retryAfter: 60, onTransport, ...settings }, fallback ? other : undefined)
  const open = () => {
    const stream = build(client)
    stream.on('error', (error) => events.push(['error', error.message, error.code]))
    return stream
  }
  return { client, others, asked, events, open }
}

/** `once` would take an error for an answer. */
const closed = (stream) => new Promise((done) => stream.once('close', done))
const gone = async (stream) => {
  const end = closed(stream)
  stream.destroy()
  await end
}

beforeEach(() => {
  opened = []
  FakeTransport.way = 'opens'
  globalThis.WebTransport = FakeTransport
})

test('bytes go both ways, and each side waits for the other', async () => {
  const { open, client } = setup({ serverCertificateHashes: ['AB'.repeat(32)], congestionControl: 'low-latency' })
  const stream = open()
  let acknowledged = 0
  stream.write('con', () => acknowledged++)
  await tick()
  const [transport] = opened
  assert.deepEqual(transport.init.protocols, ['mqtt'])
  assert.equal(transport.init.congestionControl, 'low-latency')
  assert.deepEqual(transport.init.serverCertificateHashes, [{ algorithm: 'sha-256', value: new Uint8Array(32).fill(0xab) }])
  assert.equal(String(transport.written[0]), 'con')
  assert.equal(acknowledged, 0)
  // Chunks that come while a write is under way go out in one write.
  for (const piece of ['ne', 'ct', '!']) stream.write(piece, () => acknowledged++)
  await tick()
  assert.equal(transport.written.length, 1)
  transport.sinks.shift()()
  await tick()
  assert.equal(acknowledged, 1)
  assert.equal(String(transport.written[1]), 'nect!')
  // Above the high water mark the writer must wait.
  assert.equal(stream.write(Buffer.alloc(70_000)), false)
  transport.sinks.shift()()
  await tick()
  assert.equal(acknowledged, 4)
  transport.sinks.shift()()
  await once(stream, 'drain')

  // The stream is read only on demand, and at most the high water mark ahead.
  assert.equal(transport.pulls, 0)
  stream.once('readable', () => {})
  await tick()
  assert.equal(transport.pulls, 1)
  for (let n = 0; n < 4; n++) {
    transport.source.enqueue(new Uint8Array(32 * 1024).fill(n))
    await tick()
  }
  assert.ok(transport.pulls <= 3, `${transport.pulls} pulls without a reader`)
  const got = []
  stream.on('data', (bytes) => got.push(bytes))
  while (got.reduce((sum, b) => sum + b.length, 0) < 4 * 32 * 1024) await once(stream, 'data')
  assert.deepEqual(Buffer.concat(got).subarray(-1), Buffer.from([3]))
  client.emit('connect')
  await gone(stream)
  assert.equal(client.listenerCount('connect'), 0)
})

test('an end is told before the session is closed', async () => {
  const { open, client, events } = setup()
  const stream = open()
  stream.resume()
  await tick()
  client.emit('connect')
  stream.end('disconnect')
  await tick()
  const [transport] = opened
  assert.equal(transport.closeInfo, undefined)
  transport.sinks.shift()()
  await tick()
  assert.ok(transport.finished && !transport.closeInfo)
  transport.source.close()
  transport.end({ closeCode: 0, reason: '' })
  await closed(stream)
  assert.ok(transport.closeInfo)
  assert.deepEqual(events, [['webtransport', undefined]])
})

test('a code of the session is an error, a loss is none that MQTT.js tells', async () => {
  for (const [end, expected] of [
    [(t) => (t.source.close(), t.end({ closeCode: 2, reason: 'full' })), ['error', 'session closed with code 2', 'ERR_WEBTRANSPORT_CLOSED']],
    [(t) => (t.source.error(new Error('lost')), t.break(new Error('lost'))), ['error', 'lost', undefined]],
  ]) {
    const { open, client, events } = setup()
    const stream = open()
    stream.resume()
    await tick()
    client.emit('connect')
    end(opened.at(-1))
    await closed(stream)
    assert.deepEqual(events.at(-1), expected)
  }
})

test('silence, a refusal and a browser without it lead the other way', async () => {
  for (const [way, words] of [['silent', /within 40 ms/], ['fails', /refused/], ['missing', /no WebTransport here/]]) {
    FakeTransport.way = way
    if (way === 'missing') delete globalThis.WebTransport
    const { open, others, asked, events } = setup()
    const stream = open()
    stream.write('connect')
    await asked(1)
    assert.equal(String((await once(others[0], 'data'))[0]), 'connect')
    others[0].write('connack')
    assert.equal(String((await once(stream, 'data'))[0]), 'connack')
    assert.equal(events[0][0], 'fallback')
    assert.match(events[0][1], words)
    if (way !== 'missing') assert.ok(opened.at(-1).closeInfo, 'it was given up')
    const end = closed(stream)
    others[0].end()
    stream.resume()
    // That one is the other's own.
    if (way === 'missing') stream.end()
    await end
  }
})

test('what worked is remembered for a while, and only if it worked', async (t) => {
  FakeTransport.way = 'silent'
  const { open, others, asked, events, client } = setup()
  // The whole network is away: the client learns nothing about WebTransport.
  let stream = open()
  await asked(1)
  await gone(stream)
  stream = open()
  await tick()
  assert.equal(opened.length, 2)
  await asked(2)
  client.emit('connect')
  await gone(stream)
  // Now the failure of WebTransport is remembered.
  stream = open()
  assert.equal(others.length, 3)
  assert.deepEqual(events.at(-1), ['fallback', 'WebTransport failed a while ago'])
  await gone(stream)
  const before = Date.now()
  t.mock.method(Date, 'now', () => before + 70)
  FakeTransport.way = 'opens'
  stream = open()
  await tick()
  assert.deepEqual(events.at(-1), ['webtransport', undefined])
  // The session opens, and then no bytes come.
  await gone(stream)
  stream = open()
  assert.match(events.at(-1)[1], /came to nothing/)
  await gone(stream)
  stream = open()
  await tick()
  assert.deepEqual(events.at(-1), ['webtransport', undefined])
  client.emit('connect')
  await gone(stream)
  stream = open()
  await tick()
  assert.deepEqual(events.at(-1), ['webtransport', undefined])
  await gone(stream)
})

test('MQTT.js gives up first, and nothing is left', async () => {
  FakeTransport.way = 'silent'
  const { open, others } = setup({ timeout: 10_000 })
  const stream = open()
  await tick()
  await gone(stream)
  await tick()
  assert.ok(opened[0].closeInfo)
  assert.equal(others.length, 0)
})

test('without another way the stream ends with the reason', async () => {
  FakeTransport.way = 'silent'
  const { open, events, client } = setup({ timeout: 10_000 }, false)
  client.options.connectTimeout = 40
  const stream = open()
  await closed(stream)
  assert.deepEqual(events, [['error', 'no WebTransport within 20 ms', undefined]])
})

test('nonsense is told at once', () => {
  const mqtt = { connect: () => assert.fail('must not be called') }
  for (const webTransport of [undefined, '', 'http://edge.example/mqtt', 'https://edge.example/mqtt#x', { url: 'https://x', serverCertificateHashes: ['abc'] }])
    assert.throws(() => connect(mqtt, 'wss://edge.example/mqtt', { webTransport }), TypeError)
})

test('the client is MQTT.js\' own', () => {
  const made = []
  const own = () => new Duplex()
  const mqtt = {
    connect(url, options) {
      const client = Object.assign(new Client(), { options, streamBuilder: own, connect: () => made.push('connected') })
      made.push(url, { ...options })
      return client
    },
  }
  const client = connect(mqtt, 'wss://edge.example/mqtt', { clientId: 'me', webTransport: 'https://edge.example/mqtt' })
  assert.deepEqual(made, ['wss://edge.example/mqtt', { clientId: 'me', manualConnect: true }, 'connected'])
  assert.equal(client.options.manualConnect, undefined)
  assert.notEqual(client.streamBuilder, own)
  connect(mqtt, 'wss://edge.example/mqtt', { manualConnect: true, webTransport: 'https://edge.example/mqtt' })
  assert.equal(made.length, 5)
})
