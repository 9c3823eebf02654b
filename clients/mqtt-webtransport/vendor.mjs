// Makes readable-stream.js and readable-stream.LICENSE: `npm install && npm run vendor`.
import { readFileSync, writeFileSync } from 'node:fs'
import { build } from 'esbuild'

// Node's process, or as much of it as the package uses. Its own stand-in calls back through timers.
const process = `
  const real = globalThis.process
  export const nextTick = real?.nextTick ?? ((call, ...args) => queueMicrotask(() => call(...args)))
  export const env = {}
  export const stdout = undefined
  export const stderr = undefined
  export const emitWarning = () => {}
`
const { metafile, outputFiles } = await build({
  stdin: { contents: "export { Duplex } from 'readable-stream'", resolveDir: '.' },
  bundle: true,
  format: 'esm',
  platform: 'browser',
  minify: true,
  define: { 'process.env.NODE_DEBUG': 'undefined' },
  plugins: [
    {
      name: 'process',
      setup({ onResolve, onLoad }) {
        onResolve({ filter: /^process\/?$/ }, () => ({ path: 'process', namespace: 'shim' }))
        onLoad({ filter: /.*/, namespace: 'shim' }, () => ({ contents: process, loader: 'js' }))
      },
    },
  ],
  metafile: true,
  write: false,
})
// Every package whose code is in the file, with its licence.
const used = Object.values(metafile.outputs).flatMap(({ inputs }) => Object.entries(inputs))
const folders = used
  .filter(([, { bytesInOutput }]) => bytesInOutput > 0)
  .flatMap(([path]) => path.match(/^.*node_modules\/[^/]+/)?.[0] ?? [])
const packages = [...new Set(folders)].sort().map((folder) => {
  const { name, version, license } = JSON.parse(readFileSync(`${folder}/package.json`, 'utf8'))
  return { title: `${name} ${version} (${license})`, text: readFileSync(`${folder}/LICENSE`, 'utf8').trim() }
})
const licences = packages.map(({ title, text }) => `${title}\n${'-'.repeat(title.length)}\n\n${text}\n`)
writeFileSync('readable-stream.LICENSE', `readable-stream.js contains code of these packages:\n\n${licences.join('\n\n')}`)

const head = `// Duplex of readable-stream 4.8.0 from npm, with everything that it imports, made by vendor.mjs: a folder that npm
// links into an app finds no packages of its own. Licences: see readable-stream.LICENSE.
//
${packages.map(({ title }) => `//   ${title}\n`).join('')}`
writeFileSync('readable-stream.js', head + outputFiles[0].text)
