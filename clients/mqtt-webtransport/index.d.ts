import type { IClientOptions, MqttClient, StreamBuilder } from 'mqtt'

/** How WebTransport is reached, and what to do when it is not. */
export interface WebTransportSettings extends Omit<WebTransportOptions, 'serverCertificateHashes'> {
  /** Such as `https://edge.example.com:14567/mqtt`. */
  url: string | URL
  /** Milliseconds until the other way is taken. Default 3000. */
  timeout?: number
  /** Milliseconds for which the other way is then taken at once. Default 600000. */
  retryAfter?: number
  /** SHA-256 of the server's certificate, hexadecimal, for one that no authority has signed. */
  serverCertificateHashes?: (string | WebTransportHash)[]
  /** Told of each connection which way it goes, and why not the first. */
  onTransport?: (way: 'webtransport' | 'fallback', why?: string) => void
}

export interface ConnectOptions extends IClientOptions {
  webTransport: string | URL | WebTransportSettings
}

/** `mqtt.connect(url, options)`, with WebTransport tried before `url`. */
export function connect(
  mqtt: { connect(url: string, options: IClientOptions): MqttClient },
  url: string,
  options: ConnectOptions,
): MqttClient

/** For `new MqttClient(streamBuilder(...), options)`; without `fallback` there is WebTransport only. */
export function streamBuilder(
  webTransport: string | URL | WebTransportSettings,
  fallback?: StreamBuilder,
): StreamBuilder
