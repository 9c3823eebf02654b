import type { IClientOptions, MqttClient, StreamBuilder } from 'mqtt'

/** Where the WebTransport listener is, and when to fall back. */
export interface WebTransportSettings extends Omit<WebTransportOptions, 'serverCertificateHashes'> {
  /** Address of the listener, such as `https://edge.example.com:14567/mqtt`. */
  url: string | URL
  /** Milliseconds until the fallback is used. Default 3000. */
  timeout?: number
  /** Milliseconds during which later connections use the fallback at once. Default 600000. */
  retryAfter?: number
  /** SHA-256 hashes of the server's certificate in hexadecimal, for a certificate that no authority has signed. */
  serverCertificateHashes?: (string | WebTransportHash)[]
  /** Called for each connection with its transport, and with the reason for a fallback. */
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

/** For `new MqttClient(streamBuilder(...), options)`. Without `fallback`, only WebTransport is used. */
export function streamBuilder(
  webTransport: string | URL | WebTransportSettings,
  fallback?: StreamBuilder,
): StreamBuilder
