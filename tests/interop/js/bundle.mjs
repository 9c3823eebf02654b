// Bundles a module and all its imports into one file, as the build of a web app does.
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { build } from 'esbuild'

const here = dirname(fileURLToPath(import.meta.url))

export async function bundled(file, platform) {
  const { outputFiles } = await build({
    entryPoints: [file],
    bundle: true,
    format: 'esm',
    platform,
    // Gives a module `require` for Node's built-in modules.
    mainFields: platform === 'browser' ? ['browser', 'module', 'main'] : ['module', 'main'],
    banner: platform === 'node' ? { js: "import { createRequire } from 'node:module'; const require = createRequire(import.meta.url);" } : {},
    nodePaths: [join(here, '../node_modules')],
    write: false,
    logLevel: 'error',
  })
  return outputFiles[0].text
}
