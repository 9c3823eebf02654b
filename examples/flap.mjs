// A subscriber loses its connection; the messages that it missed follow when it is back.
//
//   node flap.mjs [URL]
//
// MQTT.js connects again by itself. The broker behind Tidegate sees neither the loss nor the return.
import mqtt from 'mqtt'

const url = process.argv[2] ?? 'ws://127.0.0.1:8083/mqtt'
const session = { protocolVersion: 5, clean: false, properties: { sessionExpiryInterval: 3600 }, reconnectPeriod: 500 }

const backend = await mqtt.connectAsync(url, { protocolVersion: 5 })
const phone = await mqtt.connectAsync(url, { ...session, clientId: `phone-${process.pid}` })
await phone.subscribeAsync('doors/front', { qos: 1 })
console.log('phone: subscribed')

const messages = []
const both = new Promise((resolve) => {
  phone.on('message', (_topic, payload) => {
    messages.push(payload.toString())
    console.log(`phone: ${payload}`)
    if (messages.length === 2) resolve()
  })
})
const offline = new Promise((resolve) => phone.once('close', resolve))
phone.once('connect', ({ sessionPresent }) => console.log(`phone: session present ${sessionPresent}`))

// The network is gone: no DISCONNECT, the socket just ends.
phone.stream.destroy()
await offline
console.log('phone: offline')
for (const message of ['opened', 'closed']) await backend.publishAsync('doors/front', message, { qos: 1 })

await both
await phone.endAsync({ properties: { sessionExpiryInterval: 0 } })
await backend.endAsync()
