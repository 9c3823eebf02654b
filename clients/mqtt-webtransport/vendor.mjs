// Makes readable-stream.js: `npm install && npm run vendor`.
import { writeFileSync } from 'node:fs'
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
const { outputFiles } = await build({
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
  write: false,
})
const head = `// Duplex of readable-stream 4.8.0 (MIT, see readable-stream.LICENSE) with everything that it imports, made by
// vendor.mjs: a folder that npm links into an app finds no packages of its own.
`
writeFileSync('readable-stream.js', head + outputFiles[0].text)
