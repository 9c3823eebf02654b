// Drives MQTT.js, in Node or in headless Chromium, by commands on stdin (one JSON object a line);
// events appear on stdout, one JSON object a line.
import { readFileSync } from 'node:fs'
import { createServer } from 'node:http'
import { createInterface } from 'node:readline'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const here = dirname(fileURLToPath(import.meta.url))
const require = createRequire(import.meta.url)
const say = (event) => process.stdout.write(JSON.stringify(event) + '\n')
const commands = () => createInterface({ input: process.stdin })

async function inNode() {
  const mqtt = require('mqtt')
  const { makeAgent } = await import('./broker.mjs')
  const agent = makeAgent(mqtt, say, (options) => (options.caFile ? { ...options, ca: readFileSync(options.caFile) } : options))
  say({ event: 'up', node: process.version, mqttjs: require('mqtt/package.json').version })
  for await (const line of commands()) await agent(JSON.parse(line))
}

async function inBrowser(executablePath, profile) {
  const { chromium } = await import('playwright-core')
  const { bundled } = await import('./bundle.mjs')
  const module = await bundled(join(here, '../../../clients/mqtt-webtransport/index.js'), 'browser')
  const types = { html: 'text/html', js: 'text/javascript', mjs: 'text/javascript' }
  const files = {
    '/': join(here, 'page.html'),
    '/broker.mjs': join(here, 'broker.mjs'),
    '/mqtt.min.js': join(dirname(require.resolve('mqtt/package.json')), 'dist', 'mqtt.min.js'),
  }
  const server = createServer((request, response) => {
    if (request.url === '/mqtt-webtransport.mjs') return response.writeHead(200, { 'content-type': 'text/javascript' }).end(module)
    const file = files[request.url]
    if (!file) return response.writeHead(404).end()
    response.writeHead(200, { 'content-type': types[file.split('.').pop()] }).end(readFileSync(file))
  })
  await new Promise((done) => server.listen(0, '127.0.0.1', done))
  const context = await chromium.launchPersistentContext(profile, {
    executablePath,
    headless: true,
    ignoreHTTPSErrors: true,
    args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--ignore-certificate-errors'],
  })
  try {
    const page = await context.newPage()
    page.on('pageerror', (error) => say({ event: 'pageerror', text: String(error) }))
    page.on('console', (message) => say({ event: 'console', text: message.text() }))
    await page.exposeFunction('say', say)
    await page.goto(`http://127.0.0.1:${server.address().port}/`)
    await page.waitForFunction(() => window.agent)
    say({ event: 'up', browser: context.browser()?.version() ?? 'chromium', userAgent: await page.evaluate(() => navigator.userAgent) })
    for await (const line of commands()) {
      const command = JSON.parse(line)
      if (command.do === 'offline') await context.setOffline(command.value)
      else await page.evaluate((c) => window.agent(c), command)
    }
  } finally {
    await context.close()
    server.close()
  }
}

const [mode, ...rest] = process.argv.slice(2)
await (mode === 'browser' ? inBrowser(...rest) : inNode())
process.exit(0)
