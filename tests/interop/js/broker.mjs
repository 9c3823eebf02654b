// The part that MQTT.js in Node and in a browser share: named clients, commands in, events out.
export function makeAgent(mqtt, say, prepare = (options) => options, webTransport) {
  const clients = new Map()
  const decode = (payload) => new TextDecoder().decode(payload)
  const failed = (client, what) => (error, result) =>
    error ? say({ event: 'failed', client, what, text: String(error), code: error.code }) : say({ event: what, client, result: describe(result) })
  const describe = (result) => (Array.isArray(result) ? result.map((one) => ({ topic: one.topic, qos: one.qos })) : undefined)

  const actions = {
    connect({ client: name, url, options = {} }) {
      const onTransport = (way, why) => say({ event: 'transport', client: name, way, why })
      const one = options.webTransport
        ? webTransport.connect(mqtt, url, { ...prepare(options), webTransport: { ...options.webTransport, onTransport } })
        : mqtt.connect(url, prepare(options))
      clients.set(name, one)
      one.on('connect', (connack) => say({ event: 'connect', client: name, sessionPresent: connack.sessionPresent, assigned: connack.properties?.assignedClientIdentifier }))
      one.on('message', (topic, payload, packet) =>
        say({ event: 'message', client: name, topic, payload: decode(payload), qos: packet.qos, retain: packet.retain, dup: packet.dup, userProperties: packet.properties?.userProperties, contentType: packet.properties?.contentType }),
      )
      one.on('close', () => say({ event: 'close', client: name }))
      one.on('offline', () => say({ event: 'offline', client: name }))
      one.on('disconnect', (packet) => say({ event: 'disconnect', client: name, reasonCode: packet.reasonCode }))
      one.on('error', (error) => say({ event: 'error', client: name, text: String(error), code: error.code }))
    },
    subscribe({ client: name, topic, options = {} }) {
      clients.get(name).subscribe(topic, options, failed(name, 'subscribed'))
    },
    publish({ client: name, topic, payload, options = {} }) {
      clients.get(name).publish(topic, payload, options, failed(name, 'published'))
    },
    // Many publishes at once.
    burst({ client: name, topic, count, options = {} }) {
      for (let n = 0; n < count; n++) clients.get(name).publish(topic, `${n}`, options, failed(name, 'published'))
    },
    // A bare WebSocket, to show how much a page learns of its end.
    socket({ client: name, url, protocols = ['mqtt'], send }) {
      const one = new WebSocket(url, protocols)
      one.onopen = () => {
        say({ event: 'open', client: name, protocol: one.protocol, extensions: one.extensions })
        if (send !== undefined) one.send(typeof send === 'string' ? send : new Uint8Array(send))
      }
      one.onclose = (end) => say({ event: 'closed', client: name, code: end.code, reason: end.reason, wasClean: end.wasClean })
    },
    end({ client: name, force = false }) {
      clients.get(name).end(force, {}, () => say({ event: 'ended', client: name }))
    },
  }
  return (command) => actions[command.do](command)
}
