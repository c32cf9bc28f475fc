// As python_client.py, with the npm client. It stands beside node_modules when it is run.
import OpenAI from 'openai';

const WAIT = { query: { wait: 1 } };

async function embed(call) {
  const options = call.retries ? {} : { maxRetries: 0 };
  if (call.timeout_s !== null) options.timeout = call.timeout_s * 1000;
  const client = new OpenAI({ baseURL: call.base_url, apiKey: call.key, ...options });
  const request = { model: call.model, input: call.input };
  if (call.way === 'sync') return client.embeddings.create(request);
  let job;
  if (call.way === 'async') {
    job = await client.post('/async/embeddings', { body: request });
  } else {
    const accepted = await client.embeddings
      .create({ ...request, encoding_format: 'float' }, { headers: { Prefer: 'respond-async' } })
      .asResponse();
    job = await accepted.json();
  }
  const path = `/async/embeddings/${job.id}`;
  while (job.status === 'pending' || job.status === 'processing') job = await client.get(path, WAIT);
  return client.get(`${path}/content`);
}

async function outcome(call) {
  try {
    return { vectors: (await embed(call)).data.map((entry) => Array.from(entry.embedding)) };
  } catch (error) {
    const body = error.error ? JSON.stringify(error.error) : String(error);
    return { raised: error.constructor.name, status: error.status ?? null, body };
  }
}

let input = '';
for await (const chunk of process.stdin) input += chunk;
for (const call of JSON.parse(input)) console.log(JSON.stringify(await outcome(call)));
