// An aedes broker on a loopback port: node aedes.mjs PORT
import net from 'node:net';
import { Aedes } from 'aedes';

const broker = await Aedes.createBroker();
net.createServer(broker.handle).listen(Number(process.argv[2]), '127.0.0.1', () => console.log('listening'));
