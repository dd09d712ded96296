// A certified OpenID Provider on loopback, as an operator would set it up: one client, the broker, told of sign-outs.
// The broker's authorities come by NODE_EXTRA_CA_CERTS. Takes its settings as one JSON line on standard input, says {"port"} once it listens, and ends with its input.
import { generateKeyPairSync } from 'node:crypto';
import { readFileSync } from 'node:fs';
import https from 'node:https';
import readline from 'node:readline';
import Provider from 'oidc-provider';

const lines = readline.createInterface({ input: process.stdin });
const settings = JSON.parse(await new Promise((resolve) => lines.once('line', resolve)));
lines.once('close', () => process.exit(0));

const { privateKey } = generateKeyPairSync('rsa', { modulusLength: 2048 });
const jwk = { ...privateKey.export({ format: 'jwk' }), kid: 'provider-key', use: 'sig', alg: 'RS256' };

const server = https.createServer({ cert: readFileSync(settings.cert), key: readFileSync(settings.key) });
server.listen(settings.port, '127.0.0.1', () => {
  const issuer = `https://localhost:${server.address().port}`;
  const provider = new Provider(issuer, {
    clients: [
      {
        client_id: 'broker',
        client_secret: settings.clientSecret,
        redirect_uris: [settings.redirectUri],
        post_logout_redirect_uris: [settings.redirectUri],
        backchannel_logout_uri: settings.logoutUri,
        backchannel_logout_session_required: true,
        require_auth_time: true,
      },
    ],
    cookies: { keys: ['of this run only'] },
    jwks: { keys: [jwk] },
    features: { backchannelLogout: { enabled: true }, devInteractions: { enabled: true } },
    pkce: { required: () => false },
    // Its guard against private addresses would refuse loopback, where all of this test lives.
    fetch: (url, { dispatcher, ...options }) => globalThis.fetch(url, options),
  });
  for (const name of ['server_error', 'backchannel.error']) {
    provider.on(name, (...parts) => console.error(name, ...parts.filter((one) => one instanceof Error)));
  }
  provider.on('backchannel.success', () => console.error('backchannel.success'));
  server.on('request', provider.callback());
  console.log(JSON.stringify({ port: server.address().port }));
});
